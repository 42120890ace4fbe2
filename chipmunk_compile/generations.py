"""`generation`: says outright where a generation starts and ends."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils._pytree import tree_leaves

from .clock import Clock, InferredClock
from .counting import CountedClock
from .evidence import call_evidence, read_evidence
from .models import Root
from .owners import close_block, is_compiled, open_block, root_of
from .state import Owner


class generation:
    """Says outright where a generation starts, and ends it: its state is freed when the block ends.

    ```python
    with chipmunk_compile.generation(model, steps=28, streams=2):
        for t in timesteps: ...
    ```

    model: the model that is compiled, or whose blocks are; None for every compiled model called in the block. Blocks
        compiled one by one see no timestep: for the time of the block a forward hook on their model tells each forward.
    steps: denoising steps, streams: calls per step. With either given, calls are counted and the timestep is not read.
    """

    def __init__(self, model: torch.nn.Module | None = None, *, steps: int | None = None, streams: int | None = None):
        for name, value in (("steps", steps), ("streams", streams)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"generation({name}={value!r}): a positive integer")
        self.module = getattr(model, "_orig_mod", model)
        self._hooks_forward = model is not None and not is_compiled(model)
        self._parameters = {id(p) for p in self.module.parameters()} if self.module is not None else None
        self._counts = (steps, streams or 1) if steps or streams else None
        self._roots: list[Root] = []
        self._owners: list[Owner] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def covers(self, parameters: Sequence[torch.Tensor]) -> bool:
        return self._parameters is None or all(id(p) in self._parameters for p in parameters)

    def take(self, root: Root, owner: Owner | None = None) -> None:
        """Puts a model, and the owner of one of its calls, under this block."""
        if root.block is not self:
            root.forget()
            root.block, root.block_clock, root.hooked = self, self._clock(), self._hooks_forward
            self._roots.append(root)
        if owner is not None:
            self._owners.append(owner)

    def __enter__(self) -> generation:
        open_block(self)
        if self._hooks_forward:
            self.take(root_of(self.module, whole=False))
            self._hooks = [
                self.module.register_forward_pre_hook(self._before, with_kwargs=True),
                self.module.register_forward_hook(self._after, always_call=True),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        close_block(self)
        for hook in self._hooks:
            hook.remove()
        for root in self._roots:
            with root.lock:
                root.forget()
        for owner in self._owners:
            owner.release()
        self._roots, self._owners, self._hooks = [], [], []

    def unhook(self, root: Root) -> None:
        """Leaves the model's own graphs to begin forwards: it is compiled as a whole."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._hooks_forward = [], False
        if root.hooked:
            root.whole, root.hooked, root.block_clock = True, False, self._clock()

    def _clock(self) -> Clock | None:
        if self._counts is not None:
            return CountedClock(*self._counts)
        return InferredClock() if self._hooks_forward else None

    def _before(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Begins a forward, with the evidence of the model's own inputs: numbers and small tensors tell the time."""
        if torch.compiler.is_compiling():
            return
        times, inputs = call_evidence(args, kwargs)
        (root,) = self._roots
        with root.lock:
            root.begin_forward(root.block_clock, inputs, lambda wanted: read_evidence(times, inputs, wanted))

    def _after(self, module: torch.nn.Module, args: tuple, output: object) -> None:
        if not torch.compiler.is_compiling():
            (root,) = self._roots
            with root.lock:
                root.look_among(tree_leaves(output))
                root.end_forward()
