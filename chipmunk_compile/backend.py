"""The backend function: what `torch.compile(model, backend="chipmunk")` calls for every graph that Dynamo captures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from . import telemetry
from .config import Config
from .plan import analyse
from .runner import callable_for
from .shapes import BySize, is_symbolic

log = logging.getLogger(__name__)
_warned_of_training = False


def chipmunk(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable:
    """Dynamo's graph in, a callable out: dense, refresh or delta, as the step asks.

    Raises OptionError for options that do not exist or cannot be; nothing else: what cannot be made sparse is left
    to Inductor, with a reason (`chipmunk_compile.explain`).
    """
    config = Config.from_options(options, mode=mode)
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        _warn_of_training()
        return inductor_program(gm, example_inputs, config)
    if any(map(is_symbolic, example_inputs)):
        return BySize(gm, example_inputs, lambda: inductor_program(gm, example_inputs, config), config)
    return callable_for(
        gm, analyse(gm, example_inputs, config), config, lambda: inductor_program(gm, example_inputs, config)
    )


chipmunk.reset = telemetry.reset  # torch._dynamo.reset() calls it


def inductor_program(gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config) -> Callable:
    """What `torch.compile(model)` would do: while Dynamo's own tracing context stands."""
    from torch._inductor.compile_fx import compile_fx

    telemetry.count("compiles")
    compiled = compile_fx(gm, list(example_inputs), config_patches=config.inductor_options())

    def dense(*args):
        telemetry.count("dense")
        return compiled(*args)

    return dense


def _warn_of_training() -> None:
    global _warned_of_training
    if not _warned_of_training:
        _warned_of_training = True
        log.warning(
            "chipmunk: gradients are enabled and a weight requires them, so this graph is left to Inductor. "
            "For inference, call the model under torch.no_grad() (or torch.inference_mode())."
        )
