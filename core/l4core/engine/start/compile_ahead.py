"""Compiles, many at a time, the kernels that a start needs. Python holds its lock for a tenth of a compilation, so threads do.

Which kernels: those that a rehearsal launches (engine.rehearsal). A launch in it is a warm-up, which gives Triton the arguments and runs nothing, so
the keys are Triton's own, and what was compiled is found when the real launch asks for it.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from l4core.parallel.agree import least
from l4core.parallel.ranks import Ranks

logger = logging.getLogger(__name__)

MOST = 32
"""Threads: more wait for Python's lock."""


def compile_ahead(
    sample: Callable[[], None], everything: Callable[[], None], ranks: Ranks, device: torch.device, *, progress: bool
) -> str:
    """everything: launches every kernel that is wanted, over tensors without memory.  sample: some of them. If those are all in Triton's cache the
    others are taken to be, and read when they are launched. Ranks on one machine compile a part each and read the others' from the cache; all call
    this. → the line of the report. Where it cannot be done kernels are compiled one by one when they are first launched, as Triton does: the line
    says why."""
    began = time.perf_counter()
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError as error:
        return _given_up(error)
    index, count = _place(ranks, device)
    threads = max(1, min(MOST, _num_cores() // count))
    with _compiled() as compiled, ThreadPoolExecutor(threads) as pool:
        workers = _Workers(pool, index, count)
        with AsyncCompileMode(workers, ignore_errors=True):  # a kernel that fails says so when it is launched
            failure = _failure_of(sample)
            found = failure is None and _all_read(workers.own, compiled)
            if count > 1:
                found = bool(least(ranks, int(found), device))
            if not found:
                failure = failure or _failure_of(everything)
                own, bar = as_completed(workers.own), not progress
                for _ in tqdm(own, "kernels", len(workers.own), unit="kernel", disable=bar, leave=False):
                    pass
            if count > 1:
                least(ranks, 0, device)  # the others' parts are in the cache when all are here
            workers.begin_others()
    seconds = time.perf_counter() - began
    if found:
        return f"in Triton's cache, as a sample of {len(workers.futures)} shows · {seconds:.1f} s"
    refused = [future for future in workers.futures if future.exception() is not None]
    if failure is not None or refused:
        _given_up(failure or refused[0].exception())
    rest = f", the rest when launched: {_text(failure)}" if failure is not None else ""
    return f"{len(workers.futures)} compiled ahead, {threads} at a time · {seconds:.1f} s{rest}"


def _failure_of(rehearse: Callable[[], None]) -> Exception | None:
    try:
        with _warming_up():
            rehearse()
    except Exception as error:  # noqa: BLE001  (tensors without memory are beyond somebody's code, a vendor's kernel for one)
        return error
    return None


def _all_read(futures: Iterable[Future[Any]], compiled: Sequence[str]) -> bool:
    """Waits for the first kernel that had to be compiled, or for all."""
    return all(future.exception() is None and not compiled for future in as_completed(futures))


@contextmanager
def _compiled() -> Iterator[Sequence[str]]:
    """Names of the kernels that were not in Triton's cache, as they are compiled."""
    from triton import knobs

    names, told = list[str](), knobs.compilation.listener

    def note(*, src: Any, cache_hit: bool, **event: Any) -> None:
        if not cache_hit:
            names.append(src.name)
        if told is not None:
            told(src=src, cache_hit=cache_hit, **event)

    knobs.compilation.listener = note
    try:
        yield names
    finally:
        knobs.compilation.listener = told


def _given_up(error: BaseException | None) -> str:
    logger.warning("not all kernels are compiled ahead, the first steps may wait for one: %s", _text(error))
    return f"compiled one by one when first launched ({_text(error)})"


def _text(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@contextmanager
def _warming_up() -> Iterator[None]:
    """In here a launch compiles its kernel and runs nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def warm_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = warm_up
    try:
        yield
    finally:
        JITFunction.run = run


class _Workers(Executor):
    """Deals jobs out to the ranks of one machine, which are all given the same ones in the same order. own: done here.  futures: all."""

    def __init__(self, pool: ThreadPoolExecutor, index: int, count: int) -> None:
        self._pool, self._index, self._count = pool, index, count
        self.futures: list[Future[Any]] = []
        self.own: list[Future[Any]] = []
        self._others: list[Callable[[], None]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = Future[Any]()
        job = partial(_fulfil, future, partial(fn, *args, **kwargs))
        if len(self.futures) % self._count == self._index:
            self.own.append(future)
            self._pool.submit(job)
        else:
            self._others.append(job)
        self.futures.append(future)
        return future

    def begin_others(self) -> None:
        for job in self._others:
            self._pool.submit(job)


def _fulfil(future: Future[Any], compute: Callable[[], Any]) -> None:
    try:
        kernel = compute()
        _build_launcher(kernel)
        future.set_result(kernel)
    except BaseException as error:  # noqa: BLE001  (handed to who asks for the result)
        future.set_exception(error)


def _build_launcher(kernel: Any) -> None:
    """What launches it is C, which Triton has compiled by a process when the kernel is first launched, and keeps in its cache too."""
    from triton.runtime import driver

    try:
        driver.active.launcher_cls(kernel.src, kernel.metadata)
    except Exception as error:  # noqa: BLE001  (the launch will meet it too, and must not fail where it would not)
        logger.debug("no launcher ahead for a kernel: %s", _text(error))


def _place(ranks: Ranks, device: torch.device) -> tuple[int, int]:
    """This rank's index among those that have the same kernel cache, and how many they are."""
    if ranks.size == 1:
        return 0, 1
    from triton import knobs

    here = zlib.crc32(f"{socket.gethostname()} {knobs.cache.dir}".encode())
    cards = ranks.all_gather(torch.tensor([here], dtype=torch.int64, device=device)).flatten().tolist()
    mine = [rank for rank, where in enumerate(cards) if where == here]
    return mine.index(ranks.rank), len(mine)


def _num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
