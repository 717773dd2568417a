"""What the kits ask of an accelerator's torch module: graphs, peak memory, synchronisation, and errors on a hidden one.

torch.accelerator has no call for graphs and none for finding a host sync, so they are looked up in the device's own module (`torch.cuda`,
`torch.xpu`, a vendor's), by name: a device that lacks one is told apart, not guessed about.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "can_capture",
    "can_find_syncs",
    "capture",
    "is_accelerator",
    "no_host_sync",
    "oracle_device",
    "peak_bytes",
    "synchronize",
]


def is_accelerator(device: str) -> bool:
    return torch.device(device).type != "cpu"


def oracle_device(device: str) -> str:
    """Where float64 answers are computed: on the device where it is known to have float64, else on the CPU."""
    return device if torch.device(device).type == "cuda" else "cpu"


def _module(device: str) -> Any:
    return getattr(torch, torch.device(device).type, None)


def synchronize(device: str) -> None:
    """Wait for the device. A vendor's module may know how where torch.accelerator does not."""
    own = getattr(_module(device), "synchronize", None)
    if own is not None:
        own()
    else:
        torch.accelerator.synchronize()


# ---------------------------------------------------------------- hidden synchronisation


def can_find_syncs(device: str) -> bool:
    """Whether the device's module can turn a host sync into an error."""
    return hasattr(_module(device), "set_sync_debug_mode")


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Inside, whatever waits for the device raises RuntimeError."""
    module = _module(device)
    synchronize(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says once that it does not find all of them
        module.set_sync_debug_mode("error")
    try:
        yield
    finally:
        module.set_sync_debug_mode("default")


# ---------------------------------------------------------------- graphs


def _graph_class(device: str) -> Any:
    module = _module(device)
    return getattr(module, "CUDAGraph", None) or getattr(module, "XPUGraph", None)


def can_capture(device: str) -> bool:
    return is_accelerator(device) and _graph_class(device) is not None and hasattr(_module(device), "graph")


def capture(device: str, call: Callable[[], None]) -> Callable[[], None]:
    """Run `call` once to warm up on a side stream, capture it, and return what replays it."""
    module = _module(device)
    side = torch.Stream(device=device)
    side.wait_stream(torch.accelerator.current_stream())
    with side:
        call()
    synchronize(device)
    graph = _graph_class(device)()
    with module.graph(graph):
        call()

    def replay() -> None:
        graph.replay()
        synchronize(device)

    return replay


# ---------------------------------------------------------------- memory


def peak_bytes(device: str, call: Callable[[], object]) -> int:
    """Device memory that `call` takes at most beyond what was allocated before, whether it keeps it or not."""
    index = torch.device(device)
    synchronize(device)
    before = int(torch.accelerator.memory_allocated(index))
    torch.accelerator.reset_peak_memory_stats(index)
    kept = call()
    synchronize(device)
    peak = int(torch.accelerator.max_memory_allocated(index)) - before
    del kept
    return peak
