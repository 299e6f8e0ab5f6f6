"""How device benchmarks measure times: by CUDA events, as nodes of a CUDA graph, and by the clock of the host.

``Gpu`` is measured. ``Cpu`` replaces it with ``--on-cpu``: the same programs on the CPU backend of the cache, which shows
without a GPU that they run; its times are meaningless.

A *call* takes the number of a batch and the handle of the stream to use. Batches differ from call to call, so that no call
finds rows that the call before it has fetched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

__all__ = ["BATCHES", "IN_A_GRAPH", "Call", "Cpu", "Gpu", "Machine", "copy_rate", "host_copy_rate", "machine_of"]

Call = Callable[[int, int], Any]
BATCHES = 31  # used in turn: more than the ticks after which LRU updates a stamp, and no multiple of them
IN_A_GRAPH = 20  # calls captured in one graph, each with its own buffer
WARMUPS = 3
_WALL_CALLS = 200


class Machine(Protocol):
    """Runs calls and measures them: microseconds, one figure for each repetition."""

    ordinal: int | None
    device: torch.device

    def describe(self) -> str:
        """The device in one line."""

    def stream(self) -> int:
        """Handle of the current stream."""

    def wait(self) -> None:
        """Wait for all work."""

    def times(self, call: Call, repetitions: int, batches: int = BATCHES) -> list[float]:
        """Of one call on an idle device."""

    def graph_times(self, call: Call, repetitions: int) -> list[float] | None:
        """Per call, of ``IN_A_GRAPH`` calls in a graph; None if graphs are not available."""

    def wall_times(self, call: Call, repetitions: int) -> list[float]:
        """Host time until a call returns, over many calls in a row."""

    def between(self, work: Callable[[], Any]) -> float:
        """Of ``work``, started on an idle device."""


class Gpu:
    """One CUDA device, with the streams and events of Torch."""

    def __init__(self, ordinal: int = 0) -> None:
        torch.cuda.set_device(ordinal)
        self.ordinal: int | None = ordinal
        self.device = torch.device("cuda", ordinal)
        self._warm_up()

    def _warm_up(self) -> None:
        """Work for a moment, because the clock of an idle device is slow."""
        numbers = torch.rand(1 << 26, device=self.device)
        for _ in range(200):
            numbers *= 1.0001
        self.wait()

    def describe(self) -> str:
        facts = torch.cuda.get_device_properties(self.device)
        return f"{facts.name}, {facts.multi_processor_count} multiprocessors, {facts.total_memory >> 30} GiB"

    def stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream

    def wait(self) -> None:
        torch.cuda.synchronize()

    def times(self, call: Call, repetitions: int, batches: int = BATCHES) -> list[float]:
        stream = self.stream()
        for turn in range(WARMUPS):
            call(turn % batches, stream)
        return [self.between(lambda turn=turn: call(turn % batches, stream)) for turn in range(WARMUPS, WARMUPS + repetitions)]

    def between(self, work: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.wait()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    def graph_times(self, call: Call, repetitions: int) -> list[float] | None:
        for turn in range(WARMUPS):  # allocates memory and builds kernels before the capture
            call(turn, self.stream())
        self.wait()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(IN_A_GRAPH):
                call(turn, self.stream())
        for _ in range(WARMUPS):
            graph.replay()
        times = [self.between(graph.replay) / IN_A_GRAPH for _ in range(repetitions)]
        del graph
        torch.cuda.empty_cache()  # caches need the memory of the graph's pool
        return times

    def wall_times(self, call: Call, repetitions: int) -> list[float]:
        return [self._wall(call) for _ in range(repetitions + 1)][1:]

    def _wall(self, call: Call) -> float:
        stream = self.stream()
        self.wait()
        start = time.perf_counter()
        for turn in range(_WALL_CALLS):
            call(turn % BATCHES, stream)
        seconds = time.perf_counter() - start
        self.wait()
        return seconds / _WALL_CALLS * 1e6


class Cpu:
    """The CPU: a call is complete when it returns."""

    ordinal: int | None = None
    device = torch.device("cpu")

    def describe(self) -> str:
        return "the CPU backend (--on-cpu): shows that the program runs; its times are meaningless"

    def stream(self) -> int:
        return 0

    def wait(self) -> None:
        """Nothing to wait for."""

    def times(self, call: Call, repetitions: int, batches: int = BATCHES) -> list[float]:
        call(0, 0)
        return [self.between(lambda turn=turn: call(turn % batches, 0)) for turn in range(1, repetitions + 1)]

    def graph_times(self, call: Call, repetitions: int) -> list[float] | None:
        return None

    def wall_times(self, call: Call, repetitions: int) -> list[float]:
        return self.times(call, repetitions)

    def between(self, work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e6


def machine_of(*, on_cpu: bool) -> Machine:
    """The machine selected by the options; exits with one line if there is no GPU."""
    if on_cpu:
        return Cpu()
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, but Torch finds none; --on-cpu shows that the program runs")
    return Gpu()


def copy_rate(machine: Machine, size: int, repetitions: int = 9) -> float:
    """GB/s of a copy within the device, counting bytes read and bytes written."""
    source = torch.ones(size // 4, dtype=torch.float32, device=machine.device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(machine.times(lambda turn, stream: target.copy_(source), repetitions)) / 1e3


def host_copy_rate(machine: Machine, size: int, repetitions: int = 9) -> float:
    """GB/s of a copy from pinned memory to the device."""
    pinned = machine.ordinal is not None
    source = torch.ones(size // 4, dtype=torch.float32, pin_memory=pinned)
    target = torch.empty(size // 4, dtype=torch.float32, device=machine.device)
    call: Call = lambda turn, stream: target.copy_(source, non_blocking=pinned)  # noqa: E731
    return size / statistics.median(machine.times(call, repetitions)) / 1e3
