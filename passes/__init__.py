"""Graph -> graph, one pass a file. PASSES is the order in which the backend runs them on a canonical graph."""

from .exchanges import raise_exchanges
from .raise_attention import raise_attention
from .raise_fused_attention import raise_fused_attention
from .raise_linears import raise_linears
from .resolve_autocast import resolve_autocast
from .split_linears import split_linears

PASSES = (
    raise_exchanges,  # flattened parts sent between ranks -> by the axes that they move
    resolve_autocast,  # casts that autocast makes at run time -> _to_copy
    raise_linears,  # x @ W, addmm, pairs of 1x1 convolutions -> linear
    raise_fused_attention,  # kernels called by their names (context parallelism does that) -> the same
    raise_attention,  # every spelling of softmax(QK^T)V -> one aten.scaled_dot_product_attention
    split_linears,  # linear(cat(a, b)) -> linear(a) + linear(b), split(linear(x)) -> linears, where an MLP needs it
)
