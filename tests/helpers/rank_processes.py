"""Ranks as processes that talk over gloo, forked from one that has torch imported."""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from l4core.parallel.ranks import Ranks

T = TypeVar("T")
TIMEOUT_S = 120


def run_processes(size: int, call: Callable[[Ranks], T], folder: Path) -> list[T]:
    """call(ranks) in `size` processes at once → what each returned, in rank order. call: importable by name.  folder: for what they exchange."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "l4core.testing.ranks.serving"])
    made = [context.Process(target=_process, args=(rank, size, folder, call)) for rank in range(size)]
    for process in made:
        process.start()
    for process in made:
        process.join(TIMEOUT_S)
    codes = [process.exitcode for process in made]
    for process in made:
        process.kill()
    assert codes == [0] * size, codes
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def _process(rank: int, size: int, folder: Path, call: Callable[[Ranks], T]) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), size)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(call(Ranks(distributed.group.WORLD))))
    distributed.destroy_process_group()
