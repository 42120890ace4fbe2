"""A program recorded as one CUDA graph: the host launches it whole, in place of its kernels one by one.

`mode="reduce-overhead"` asks for it. Weights and state are read where they lie; another stream's state, or the state
of another generation that lies elsewhere, is another recording. All other inputs are copied to where the recording
reads them, and outputs are copied out of it: nothing that a caller holds is overwritten by a later step. What a
program needs in between stays allocated, once for all recordings of a device: they run one after the other.

What cannot be recorded runs as it is: graphs that write to their inputs, take tensors of the host, or exchange tensors
with other ranks, and those whose kernels CUDA refuses to record.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import fx

from . import telemetry
from .passes.collectives import collectives
from .passes.cuts import ops_of, writes
from .passes.retrace import storages

log = logging.getLogger(__name__)
# Recordings of one program: streams that take turns, and addresses that come back from one generation to the next.
MOST = 8
# So many that were never replayed are enough: addresses do not come back (weights that are moved for every step).
WASTED = 4
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Unrecordable(Exception):
    """Why a program runs as it is."""


class Lane:
    """What all recordings of one device share: memory, and the stream that they are recorded on."""

    def __init__(self, device: torch.device) -> None:
        self._recorder = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Lane:
        return Lane(device)

    def record(self, program: Callable, inputs: Sequence) -> tuple[Callable[[], None], Any]:
        """(what launches the program with these very inputs, where its outputs will lie). Nothing runs."""
        current, graph = torch.cuda.current_stream(self._recorder.device), torch.cuda.CUDAGraph()
        self._recorder.wait_stream(current)
        if not self._graphs:  # the memory of the last one that was dropped is on its way back
            self._pool = torch.cuda.graph_pool_handle()
        # `torch.cuda.graph` would give all free memory back first, which the next step then has to ask for again.
        with torch.cuda.stream(self._recorder):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                outputs = program(*inputs)
            finally:
                graph.capture_end()
        current.wait_stream(self._recorder)
        self._graphs.add(graph)
        return graph.replay, outputs

    def records(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def take_turn(self) -> None:
        """What is launched next waits for the last recording that ran, whichever stream that ran on."""
        torch.cuda.current_stream(self._recorder.device).wait_event(self._done)

    def end_turn(self) -> None:
        self._done.record(torch.cuda.current_stream(self._recorder.device))


@dataclass
class _Recording:
    launch: Callable[[], None]
    inputs: list[torch.Tensor]  # where it reads what is copied in
    outputs: list  # where it leaves them
    returned: dict[int, int]  # outputs that are arguments, by position
    replays: int = 0


class Replayed:
    """The callable. It counts on the arguments of every call to be laid out as those of the first."""

    def __init__(self, program: Callable, static: Sequence[bool], lane: Lane) -> None:
        """static: as for `refusal`, which had nothing to say."""
        self._program, self._lane = program, lane
        self._static = tuple(static)
        self._copied = [position for position, is_static in enumerate(static) if not is_static]
        self._recordings: OrderedDict[tuple[int, ...], _Recording] = OrderedDict()
        self._ran = False
        self._wasted = 0
        self._lock = threading.Lock()
        telemetry.holders.add(self)

    state_bytes = host_state_bytes = 0  # of what is counted: state is not its own

    def release(self) -> None:
        with self._lock:
            self._recordings.clear()

    def __call__(self, *args):
        # What is compiled, tuned or allocated at the first call is no part of a recording; a caller may record, too.
        if not self._ran or self._lane.records():
            outputs, self._ran = self._program(*args), True
            return outputs
        with self._lock:
            recording = self._recording(args)
            if recording is not None:
                return self._replay(recording, args)
        return self._program(*args)

    def _recording(self, args: Sequence) -> _Recording | None:
        if self._wasted > WASTED:
            return None
        addresses = tuple(map(torch.Tensor.data_ptr, compress(args, self._static)))
        recording = self._recordings.get(addresses)
        if recording is not None:
            self._recordings.move_to_end(addresses)
            return recording
        if len(self._recordings) == MOST:
            _, oldest = self._recordings.popitem(last=False)
            self._wasted = self._wasted + 1 if oldest.replays <= 1 else 0
        try:
            recording = self._recordings[addresses] = self._record(args)
        except (RuntimeError, Unrecordable) as failure:
            self._wasted = WASTED + 1
            self._recordings.clear()
            log.info("no CUDA graph: %s", failure)
        return recording

    def _record(self, args: Sequence) -> _Recording:
        inputs = list(args)
        with torch.inference_mode(False):
            for position in self._copied:
                given = args[position]
                if torch._debug_has_internal_overlap(given) == 1:
                    raise Unrecordable("an input overlaps itself")
                inputs[position] = torch.empty_strided(
                    given.shape, given.stride(), dtype=given.dtype, device=given.device
                )
        launch, made = self._lane.record(self._program, inputs)
        lies_in = {value.untyped_storage().data_ptr(): position for position, value in enumerate(inputs)}
        returned = {}
        for number, value in enumerate(made):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in lies_in:
                position = returned[number] = lies_in[value.untyped_storage().data_ptr()]
                if value is not inputs[position]:
                    raise Unrecordable("an output is a view of an input")
        return _Recording(launch, [inputs[position] for position in self._copied], list(made), returned)

    def _replay(self, recording: _Recording, args: Sequence) -> list:
        recording.replays += 1
        self._lane.take_turn()
        if recording.inputs:
            torch._foreach_copy_(recording.inputs, [args[position] for position in self._copied])
        recording.launch()
        outputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in recording.outputs]
        for number, position in recording.returned.items():
            outputs[number] = args[position]
        self._lane.end_turn()
        return outputs


def refusal(graph: fx.GraphModule, static: Sequence[bool], args: Sequence) -> str | None:
    """Why calls of a graph cannot be recorded, as far as the graph tells; None where nothing is in the way.

    static: which inputs keep their address as long as they are what they are: weights, and state. args: of a call.
    """
    odd = next((type(value).__name__ for value in args if type(value) not in _PLAIN), None)
    if odd is not None:
        return f"an input is of type {odd}"
    devices = {value.device for value in args}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        return f"inputs on {' and '.join(sorted(map(str, devices)))}"
    if any(True for _ in collectives(graph)):
        return "ranks exchange tensors"
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    copied = {node for node, is_static in zip(inputs, static, strict=True) if not is_static}
    memory = set().union(*map(storages, copied))
    for node in ops_of(graph):
        for written in writes(node):
            if written in copied or memory & storages(written):
                return f"{node} writes to an input"
    return None
