"""Which batches get a graph, and why none does. Torch-free: `l4 plan` counts them too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from l4core.platform import Platform, has_triton
from l4core.plugin_api import Usable

FINE = (1, 2, 3, 4, 5, 6, 7, 8)
"""Every one of the smallest batches: there a padding row may cost another expert's weights, a tenth of the step."""
LARGEST = 512
"""By default no batch beyond this is captured; padding and launches are small beside such a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """sizes: batches of decodes to capture, smallest first.  off: why there are none, and the flag that changes it; "" when there are some."""

    sizes: Sequence[int] = ()
    off: str = ""


def graph_sizes(
    platform: Platform, verdict: Usable, *, backend: str, disabled: bool, largest: int | None, max_running: int
) -> GraphSizes:
    """verdict: of the attention backend.  largest: `--cuda-graph-max-bs`."""
    if disabled:
        return GraphSizes(off="--disable-cuda-graph")
    if platform.device_type != "cuda":
        return GraphSizes(off=f"device {platform.device_type} has none that L4 uses")
    if not has_triton(platform.device_type):
        return GraphSizes(off="triton is not installed: pip install triton")
    if not verdict.graph:
        return GraphSizes(off=f"the attention backend {backend} declares none: l4 backends names others")
    return GraphSizes(sizes=batch_sizes(min(max_running, LARGEST if largest is None else largest)))


def batch_sizes(largest: int) -> list[int]:
    """Up to `largest`: a batch is padded to the next one. Four for each doubling."""
    sizes, size = [n for n in FINE if n <= largest], FINE[-1]
    while size < largest:
        size += 1 << (size.bit_length() - 3)
        sizes.append(min(size, largest))
    return sizes
