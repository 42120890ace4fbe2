"""What one call shows of itself: which objects it was given, at which time, and what they hold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat

import torch
from torch.utils._pytree import tree_leaves

# Inputs that changed by this share of their norm in one step are others: independent noise differs by 1.4, a step of
# a 4-step schedule by up to 0.5.
LEAP = 1.0

Inputs = Sequence[torch.Tensor]
Fingerprint = tuple[float, ...]
# Devices from which numbers come while the host goes on.
ASYNCHRONOUS = {"cuda"}
Times = tuple[float, ...]  # of each candidate for the timestep
Reader = Callable[[Sequence[int]], tuple[Times, dict[int, Fingerprint]]]


class Evidence:
    """One call: its time, and for each input the object (weakly), its version and its fingerprint."""

    def __init__(self, inputs: Inputs, on_death: Iterable[Callable | None] = repeat(None)) -> None:
        """on_death: called when the input goes, by position."""
        self.at((math.nan,))
        self.objects = list(map(weakref.ref, inputs, on_death))
        self.versions = [_version(t) for t in inputs]
        self.prints: dict[int, Fingerprint] = {}

    def __len__(self) -> int:
        return len(self.objects)

    def at(self, times: Times) -> None:
        """Says when. `time` moves when the timestep does: candidates that never move (guidance scales) add what stays
        the same."""
        self.times, self.time = times, sum(times)

    def way_since(self, first: Times) -> float:
        """How far the time had to go at a first step, without the candidates that stayed: timesteps end at 0, or, where
        they count up, at 1 or 1000."""
        moved = [(then, now) for then, now in zip(first, self.times) if then != now]
        return abs(sum(then if now < then else max((1.0 if now <= 1.0 else 1000.0) - then, 0.0) for then, now in moved))

    def recall(self, past: Sequence[Evidence]) -> None:
        """Takes the fingerprints of inputs that were seen before from calls in the `past`, the last one last."""
        for position, reference in enumerate(self.objects):
            mine = reference()
            for other in reversed(past):
                if position < len(other.objects) and other.objects[position]() is mine:
                    version = self.versions[position]
                    if position in other.prints and version is not None and other.versions[position] == version:
                        self.prints[position] = other.prints[position]
                    break

    def is_gone(self, position: int) -> bool:
        """Whether the caller has dropped that input."""
        return position < len(self.objects) and self.objects[position]() is None

    def same_object(self, other: Evidence, position: int, looked_into: bool = True) -> bool:
        """Whether an input is the object that it was, unwritten. What was made in inference mode does not tell when it
        is written to: its content does, if that is known already (`looked_into`)."""
        if position >= len(other.objects) or position >= len(self.objects):
            return False
        mine = self.objects[position]()
        if mine is None or mine is not other.objects[position]():
            return False
        version = self.versions[position]
        if version is None and looked_into and not self.same_content(other, position):
            return False
        return version == other.versions[position]

    def same_content(self, other: Evidence, position: int) -> bool:
        mine = self.prints.get(position)
        return mine is not None and mine == other.prints.get(position)

    def same(self, other: Evidence, position: int) -> bool:
        return self.same_object(other, position) or self.same_content(other, position)

    def changes(self, after: Evidence, positions: Iterable[int]) -> tuple[int, int, float]:
        """How many of the inputs changed, how many of those became something else altogether, and the largest change
        as a share of what came `after`."""
        changed = leaped = 0
        largest = 0.0
        for position in positions:
            old, new = self.prints.get(position), after.prints.get(position)
            if old and new and len(old) == len(new) and old != new:
                # The first number is a sum over the whole input; the others are samples of it.
                distance = math.dist(old[1:], new[1:]) / (math.hypot(*new[1:]) or 1.0)
                changed += 1
                leaped += distance > LEAP
                largest = max(largest, distance)
        return changed, leaped, largest


def _version(tensor: torch.Tensor) -> int | None:
    """Moves when the tensor is written in place: a static buffer that is filled anew is another input. None where
    nothing moves: of tensors made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def fingerprint(tensor: torch.Tensor) -> torch.Tensor:
    """Float64 [1 + up to 64]: the sum of the tensor, and evenly spaced elements. Equal for equal contents."""
    return torch.cat(_sum_and_samples(tensor))  # which makes them all float64


def _sum_and_samples(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().flatten()
    apart = max(1, flat.numel() // 64)
    return flat.sum(0, keepdim=True, dtype=torch.float64), flat[: 64 * apart : apart]


def call_evidence(args: Sequence, kwargs: Mapping) -> tuple[list[torch.Tensor | float], list[torch.Tensor]]:
    """What a model's own call shows: candidates for the timestep (numbers and small tensors), and all other inputs."""
    leaves = tree_leaves((tuple(args), dict(kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    times = [leaf for leaf in leaves if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]
    return [*times, *(t for t in tensors if t.dim() <= 1)], [t for t in tensors if t.dim() > 1]


def read_evidence(
    times: Sequence[torch.Tensor | float],
    inputs: Inputs,
    positions: Sequence[int],
    meanwhile: Callable[[], None] | None = None,
) -> tuple[Times, dict[int, Fingerprint]]:
    """The times as numbers, and the fingerprints of the inputs at `positions`: all in one read from the device.

    times: candidates for the timestep. Those that never move do no harm.
    meanwhile: called where the host would wait for the device, and only there.
    """
    plain = [float(t) for t in times if not isinstance(t, torch.Tensor)]
    parts = [_mean(t) for t in times if isinstance(t, torch.Tensor)]
    timesteps, ends = len(parts), []
    for position in positions:
        total, samples = _sum_and_samples(inputs[position])
        parts += total, samples
        ends.append(1 + samples.numel() + (ends[-1] if ends else timesteps))
    if not parts:
        return tuple(plain), {}
    # From the device where most lies: a part on the CPU goes there without waiting for it.
    device = next((p.device for p in parts if p.device.type != "cpu"), parts[0].device)
    numbers = torch.cat([p if p.device == device else p.to(device, non_blocking=True) for p in parts])
    read = _read_beside(numbers, meanwhile) if meanwhile and device.type in ASYNCHRONOUS else numbers.tolist()
    begins = [timesteps, *ends]
    prints = {position: tuple(read[begin:end]) for position, begin, end in zip(positions, begins, ends)}
    return (*plain, *read[:timesteps]), prints


def _mean(time: torch.Tensor) -> torch.Tensor:
    """Float64 [1]."""
    time = time.detach().reshape(-1)
    return time.double() if time.numel() == 1 else time.mean(0, keepdim=True, dtype=torch.float64)


class TimesRead:
    """What was read last. Of guidance by two calls, the second hands over the same timestep: that is not read again."""

    def __init__(self) -> None:
        self._last: tuple[list[weakref.ref], list[int], Times] = [], [], ()
        self._seen: set[tuple] = set()  # inputs of the calls since

    def read(
        self,
        times: Sequence[torch.Tensor],
        inputs: Inputs,
        positions: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[Times, dict[int, Fingerprint]]:
        """As `read_evidence`."""
        references, versions, known = self._last
        same = (r() is t and v == _version(t) for r, v, t in zip(references, versions, times))
        # The same inputs once more are another step, of buffers written in ways that move no version.
        call = tuple((id(tensor), _version(tensor)) for tensor in inputs)
        if not positions and len(times) == len(references) and call not in self._seen and all(same):
            self._seen.add(call)
            return known, {}
        self._seen = {call}
        found, prints = read_evidence(times, inputs, positions, meanwhile)
        if not any(t.is_inference() for t in times):  # nothing tells when those are written
            self._last = [weakref.ref(t) for t in times], [_version(t) for t in times], found
        return found, prints


def _read_beside(numbers: torch.Tensor, meanwhile: Callable[[], None]) -> list[float]:
    """The numbers, after `meanwhile`: what that launches on the device stands behind them in the queue."""
    if numbers.device.type == "cpu":
        meanwhile()
        return numbers.tolist()
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(numbers.device))
    meanwhile()
    done.synchronize()
    return host.tolist()
