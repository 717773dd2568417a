"""Device graphs of steps with a fixed shape: captured at the start, one memory pool for all. With platform.py and Triton files the only place that
says torch.cuda."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from tqdm import tqdm

from l4core.engine.run.fixed_step import StepShape


class Step(Protocol):
    """What can be captured: work of a fixed shape whose `run` reads and writes device memory only."""

    shape: StepShape

    def run(self) -> Any: ...


S = TypeVar("S", bound=Step)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured(Generic[S]):
    """computed: what `run` returned, in the graph's memory."""

    graph: torch.cuda.CUDAGraph
    step: S
    computed: Any


class Graphs(Generic[S]):
    """Captured steps by shape. num_bytes: device memory they took.  seconds: to capture them."""

    def __init__(self, make: Callable[[StepShape], S], shapes: Iterable[StepShape], *, progress: bool) -> None:
        """make: a step of a shape; all of them write their logits into the same memory, so little of a capture outlives it and the next one takes
        its place in the pool. The largest comes first, and the others fit."""
        began = time.perf_counter()
        before, _ = torch.cuda.mem_get_info()
        self._captured: dict[StepShape, _Captured[S]] = {}
        pool: Any = None
        ordered = sorted(shapes, reverse=True)
        with tqdm(ordered, desc="graphs", unit="graph", disable=not progress, leave=False) as bar:
            for shape in bar:
                made = _capture(make(shape), pool)
                pool = pool or made.graph.pool()
                self._captured[shape] = made
        torch.cuda.empty_cache()
        after, _ = torch.cuda.mem_get_info()
        self.num_bytes = max(0, before - after)
        self.seconds = time.perf_counter() - began
        self._sizes: dict[int, Sequence[int]] = {
            n: sorted(s.num_seqs for s in self._captured if s.num_tokens == n)
            for n in sorted({s.num_tokens for s in self._captured})
        }

    @property
    def shapes(self) -> Sequence[StepShape]:
        """What was captured, smallest first."""
        return sorted(self._captured)

    def find(self, num_seqs: int, num_tokens: int) -> S | None:
        """The shortest captured step that holds so many sequences of so many tokens, and of those the smallest; None = none does."""
        for count, sizes in self._sizes.items():
            size = next((size for size in sizes if size >= num_seqs), None) if count >= num_tokens else None
            if size is not None:
                return self._captured[StepShape(size, count)].step
        return None

    def replay(self, step: S) -> Any:
        """Queue it → what its `run` returned. The next replay, of any shape, overwrites the result's tensors."""
        captured = self._captured[step.shape]
        captured.graph.replay()
        return captured.computed


def _capture(step: S, pool: Any) -> _Captured[S]:
    """Runs the step once as it is, since kernels are compiled and workspaces made on first use, then captures it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step.run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        computed = step.run()
    return _Captured(graph=graph, step=step, computed=computed)
