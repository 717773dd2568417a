"""The chart of `l4 plan --plot`: KV memory of one request against its length, with and without the hybrid cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from l4core.engine.start.capacity import Setup
    from l4core.model.config import ModelConfig

GIB = 1 << 30
LENGTHS = (*(int(base * 10**power) for power in range(3, 7) for base in (1, 2, 3, 5, 8)), 10_485_760)


def memory_chart(title: str, config: ModelConfig, setup: Setup) -> str:
    """An SVG document. Lines end where a request does not fit any more; dashed: what the device has for KV."""
    from l4core.bench.svg import Axis, Series, line_chart
    from l4core.engine.start.capacity import capacity

    free = dataclasses.replace(setup, context_length=None, lengths=())
    budget = capacity(config, free).budget.kv / GIB
    lines = [
        Series(
            name=f"{name}, KV {kind}", points=_points(config, dataclasses.replace(free, kv_bytes=size, hybrid=hybrid))
        )
        for kind, size in (("bfloat16", 2), ("fp8", 1))
        for name, hybrid in (("every layer keeps every token", False), ("hybrid: local layers keep a chunk", True))
    ]
    longest = max(tokens for line in lines for tokens, _ in line.points)
    lines.append(
        Series(name="memory for KV on the device", points=[(LENGTHS[0], budget), (longest, budget)], dashed=True)
    )
    return line_chart(
        title,
        Axis(label="tokens of one request", log=True),
        Axis(label="GiB of KV on each device", log=True),
        lines,
    )


def _points(config: ModelConfig, setup: Setup) -> Sequence[tuple[float, float]]:
    from l4core.engine.start.capacity import capacity
    from l4core.kv.planner import Footprint

    found = capacity(config, setup)
    groups = config.kv_groups(hybrid=setup.hybrid, num_draft_layers=int(setup.draft is not None))
    footprint = Footprint(groups=groups, shape=found.kv.shape, page_size=found.kv.page_size)
    most = found.kv.largest_context
    lengths = [*(n for n in LENGTHS if n < most), most]
    return [(n, footprint.superpages(n) * found.kv.superpage_bytes / GIB) for n in lengths]
