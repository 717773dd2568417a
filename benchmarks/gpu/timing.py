"""Times of device work, from captured graphs: launch gaps of the host are not in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


LONG_US = 2e5
"""A graph that runs longer is replayed three times only."""


def graph_us(calls: Sequence[Call], *, once: Call | None = None, every: int = 12, repeats: int = 9) -> float:
    """GPU microseconds a call: all of `calls`, and `once` before each `every` of them, captured as one graph; the median of `repeats` replays."""

    graph = capture(calls, once=once, every=every)
    times: list[float] = []
    while len(times) < (repeats + 2 if not times or times[-1] < LONG_US else 3):
        times.append(replay_us(graph))
    return statistics.median(times[-repeats:]) / len(calls)


def capture(calls: Sequence[Call], *, once: Call | None = None, every: int = 12) -> torch.cuda.CUDAGraph:
    """All of `calls`, and `once` before each `every` of them, as one graph that has run once."""

    def step() -> None:
        for index, call in enumerate(calls):
            if once is not None and index % every == 0:
                once()
            call()

    return _capture(step)


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    """GPU microseconds of one replay; waits for it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _capture(step: Call) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def host_us(call: Call, *, calls: int = 200) -> float:
    """Host microseconds until `call` returns, with an idle device: the median of `calls`."""
    for _ in range(20):
        call()
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6
