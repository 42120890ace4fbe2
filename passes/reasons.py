"""Why a candidate is left dense: one enum, with the numbers that decided."""

from __future__ import annotations

import enum


class Reason(enum.Enum):
    """Every reason for leaving a site, a graph or a call dense. The value is what a person reads."""

    # One attention or MLP candidate.
    CROSS_ATTENTION = "keys and values come from another sequence than the queries"
    UNPROVEN_SELF_ATTENTION = "queries and keys share inputs, but are not proven to be the same tokens"
    KEYS_OF_RANKS = "keys and values are gathered from other ranks, queries are this rank's own"
    PARTIAL_ATTENTION = "attention over a part of the keys, joined with the other parts by its log-sum-exp (ring)"
    CAUSAL = "causal attention: a chunk's columns end where the chunk stands"
    UNSUPPORTED_MASK = "the mask is not a key mask (one row for all queries)"
    TOO_FEW_TOKENS = "fewer tokens than min_tokens: sparse would not pay"
    CONDITIONING_MLP = "an MLP on the conditioning (timestep, pooled text), not on tokens"
    NOT_PROFITABLE = "the predicted saving is smaller than the overhead"
    UNSUPPORTED_ACTIVATION = "the pointwise region holds an op that the kernel generator cannot print"
    UNSUPPORTED_DTYPE = "dtype is not float32, bfloat16 or float16"
    UNSUPPORTED_SHAPE = "the shapes are outside what the kernels handle"
    NO_KERNELS = "this device has no kernels for the sparse ops; their plain meaning is slower than dense"
    MIXED_DTYPE = "operand dtypes differ (quantised or partly cast weights)"
    DROPOUT = "dropout is active: the model is in training mode"
    SHARED_HIDDEN = "the hidden activation is used outside the MLP too"
    UNFUSED_ADAPTER = "a low-rank adapter (LoRA) runs beside the weights: fuse it into them"
    WEIGHT_NOT_INPUT = "the weight is computed inside the graph (quantised or merged at run time)"
    ATTENTION_FORM = "softmax attention with another use of its weights, or a mask that no attention op takes"
    NOT_SOFTMAX_ATTENTION = "linear or otherwise unnormalised attention"
    DISABLED_BY_OPTION = "switched off by an option"
    OVER_BUDGET = "its state does not fit the memory budget, or what is over it the memory of the host"
    NO_OFFLOAD = "its state does not fit the memory budget, and cannot move: CUDA graphs replay at fixed addresses"
    # A whole graph.
    NO_SITES = "no attention or MLP site in this graph"
    NO_OWNER = "the graph receives no parameters, so its state would have no owner"
    NO_LASTING_OWNER = "parameters are other objects at every call (sequential offload): no state can be kept"
    NO_CANONICAL_FORM = "the graph could not be exported to functional ATen"
    SHARDED_WEIGHTS = "weights are DTensors (tensor parallelism): what they compute is no graph of plain tensors yet"
    RANKS_APART = (
        "other ranks run this graph too, and it is not known over what to agree with them on each step's program"
    )
    ALIASED_MUTATION = "the graph mutates an input whose storage another input shares"
    TRAINING = "gradients are required"
    TOO_MANY_SIZES = "programs were compiled for as many sizes of this graph as are kept; this one stays dense"
    # The token permutation.
    NO_GRID = "nothing says how the tokens lie in time and space: set options={'grid': (frames, height, width)}"
    AMBIGUOUS_GRID = "views contradict each other about the grid: set options={'grid': (frames, height, width)}"
    GRID_MISMATCH = "no self-attention has as many tokens as the given grid"
    SPREAD_TOKENS = (
        "each rank's part of the tokens is not known to be a grid: set options={'grid': (frames, height, width)}"
    )
    WALLED_IN = "going around the ops that fix the order of tokens costs more than token order is worth"
    # One call.
    NO_CLOCK = "no evidence of step and stream: no timestep input, no generation(), no steps option"
    UNKNOWN_NOISE = (
        "the model predicts noise, and how much of its latents is noise at a step is not known (steps are counted, "
        "several inputs could be the latents, or the model runs in pieces)"
    )
    FEW_STEPS = "the generation has so few steps that all of them would be computed in full"
    DISABLED = "inside chipmunk_compile.disabled()"
