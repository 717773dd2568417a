"""Which CPUs and models the kernels take: decided from plain data, no torch imported."""

from __future__ import annotations

from l4_cpu.build_kernels import INSTRUCTIONS, library
from l4core.plugin_api import (
    AttentionRequirements,
    ExpertRequirements,
    ExpertsUsable,
    Platform,
    Tier,
    Unusable,
    Usable,
)

ITEMSIZE = {"float32": 4, "bfloat16": 2}
LANES = 16
"""Numbers of columns are multiples of this: two of AVX2's vectors, one of AVX-512's."""
MAX_THREADS = 256
TILE_ROWS, TILE_KEYS, PART_KEYS = 64, 64, 4096
"""Of csrc/attention.h: rows of a tile, keys of a block, keys that one thread takes of a sequence with few rows."""
MAX_NODES = 64


def probe_attention(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    refused = _machine(platform) or _attention(requirements)
    return refused or Usable(
        tier=Tier.TUNED,
        preferred_page_size=64,
        tree_mask=True,
        workspace_bytes=_attention_bytes(requirements),
        provider=platform.runtime,
        note="a row's result does not depend on the rows beside it",
    )


def probe_experts(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    refused = _machine(platform) or _experts(requirements)
    return refused or ExpertsUsable(
        tier=Tier.TUNED,
        skips=True,
        workspace_bytes=_expert_bytes(requirements),
        provider=platform.runtime,
        note="a row's result does not depend on the rows beside it, nor on how many there are",
    )


def _machine(platform: Platform) -> Unusable | None:
    if platform.device_type != "cpu":
        return Unusable(reason=f"device {platform.device_type}; wanted a CPU", fix="--device cpu")
    if platform.runtime not in INSTRUCTIONS:
        found = platform.runtime or "none of them"
        return Unusable(reason=f"found {found} ({platform.arch}); wanted one of {', '.join(INSTRUCTIONS)}, on Linux")
    if not library(platform.runtime).exists():
        return Unusable(
            reason="its kernels are not built: there was no C++ compiler when it was installed",
            fix="python -m l4_cpu.build_kernels",
        )
    return None


def _attention(req: AttentionRequirements) -> Unusable | None:
    if req.q_dtype not in ITEMSIZE:
        wanted = " or ".join(ITEMSIZE)
        return Unusable(reason=f"queries are {req.q_dtype}; wanted {wanted}", fix="--attention-backend sdpa")
    if req.kv_dtype != req.q_dtype:
        return Unusable(reason=f"KV is {req.kv_dtype}; wanted {req.q_dtype}, as queries", fix="--kv-cache-dtype auto")
    if req.head_dim % LANES:
        return Unusable(
            reason=f"head_dim is {req.head_dim}; wanted a multiple of {LANES}", fix="--attention-backend sdpa"
        )
    if req.num_q_heads % req.num_kv_heads:
        found = f"{req.num_q_heads} query heads on {req.num_kv_heads} KV heads"
        return Unusable(reason=f"{found}; wanted a whole number of query heads per KV head")
    if req.needs_tree and req.num_draft_tokens >= MAX_NODES:
        found = f"a tree of {req.num_draft_tokens + 1} nodes"
        return Unusable(reason=f"{found} is asked for; wanted at most {MAX_NODES}")
    if req.needs_graph:
        return Unusable(
            reason="graph capture is asked for; these kernels run on a CPU, which has none", fix="--disable-cuda-graph"
        )
    return None


def _experts(req: ExpertRequirements) -> Unusable | None:
    if req.dtype not in ITEMSIZE:
        return Unusable(reason=f"dtype is {req.dtype}; wanted {' or '.join(ITEMSIZE)}", fix="--expert-kernel torch")
    formats = {req.weight_format, req.shared_format} - {"plain", None}
    if formats:
        return Unusable(reason=f"weights are {', '.join(map(str, formats))}; these kernels take plain ones")
    for name, size in (("hidden", req.hidden_size), ("intermediate", req.intermediate_size)):
        if size % LANES:
            return Unusable(reason=f"{name} size is {size}; wanted a multiple of {LANES}", fix="--expert-kernel torch")
    if req.needs_graph:
        return Unusable(reason="graph capture is asked for; a CPU has none", fix="--disable-cuda-graph")
    return None


def _attention_bytes(req: AttentionRequirements) -> int:
    """Queries, scores and sums of a tile for each thread, and unfinished sums of sequences that several threads share."""
    rows = max(TILE_ROWS, req.num_q_heads // req.num_kv_heads)
    return 4 * MAX_THREADS * rows * (2 * req.head_dim + TILE_KEYS + 2)


def _expert_bytes(req: ExpertRequirements) -> int:
    """Of one call: what stands between the products, for the routed and for the shared expert, and the order of rows."""
    return req.max_num_tokens * (2 * req.intermediate_size * ITEMSIZE[req.dtype] + 4) + 8 * req.num_experts
