"""Which AMD GPUs, versions of AITER and models this backend takes: decided from plain data, neither torch nor aiter imported."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import Version

from l4core.plugin_api import (
    AttentionRequirements,
    ExpertRequirements,
    ExpertsUsable,
    Platform,
    Tier,
    Unusable,
    Usable,
)

FP8: Mapping[str, str] = {"gfx942": "float8_e4m3fnuz", "gfx950": "float8_e4m3fn"}
"""Architecture → the fp8 format of its matrix units. A value read in the other format is off by a factor of two."""

MODULE, DISTRIBUTION = "aiter", "amd-aiter"
"""PyPI also has an `aiter` that is a toolbox for iterators: the distribution's name tells them apart, and `create` looks for the kernel itself."""

OLDEST = Version("0.1.7.dev0")

PAGE_SIZES = (64, 128)
"""Of the multiples of 16 that the kernel takes, those that hold a whole tile of 64 keys. With smaller ones a tile reads the block table past the
end of a row."""

SMALLEST_HEAD, LARGEST_HEAD, HEAD_MULTIPLE = 32, 256, 16
MOST_SEGMENTS = 128
MOST_PROGRAMS = 4 * 304 * 4
"""Of AITER's split of keys: it aims at 4 programs a compute unit (304 on gfx942, 256 on gfx950) and 4 times that at most in newer versions."""

EXPERT_TILE = 32
"""The kernel reads weights in tiles of 16 outputs by 32 inputs."""

FIX = "use one of AMD's images with AITER, or build it from github.com/ROCm/aiter"


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    refused = _device(platform) or _library(platform) or _model(platform, requirements)
    if refused is not None:
        return refused
    return Usable(
        tier=Tier.NATIVE,
        page_sizes=PAGE_SIZES,
        preferred_page_size=64,
        graph=True,
        empty_rows=False,
        finite_tail=True,
        workspace_bytes=workspace_bytes(requirements),
        provider=_provider(platform),
    )


def probe_experts(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    """Only when named: its products of bfloat16 have not been run by anyone from here."""
    refused = _device(platform) or _library(platform) or _experts(requirements)
    if refused is not None:
        return refused
    rows = requirements.max_num_tokens
    return ExpertsUsable(
        tier=Tier.NATIVE,
        graph=True,
        workspace_bytes=rows * (3 * requirements.intermediate_size + 2 * requirements.hidden_size) * 2,
        named_only=True,
        provider=_provider(platform),
        note="not yet run on an Instinct GPU; checked against torch at start",
    )


def _experts(req: ExpertRequirements) -> Unusable | None:
    if req.dtype not in ("bfloat16", "float16"):
        return Unusable(reason=f"dtype is {req.dtype}; wanted bfloat16 or float16", fix="--dtype bfloat16")
    formats = {req.weight_format, req.shared_format} - {"plain", None}
    if formats:
        return Unusable(reason=f"weights are {', '.join(map(str, formats))}; wanted plain ones")
    if req.hidden_size % EXPERT_TILE or req.intermediate_size % EXPERT_TILE:
        found = f"experts of {req.hidden_size} by {req.intermediate_size}"
        return Unusable(reason=f"found {found}; wanted multiples of {EXPERT_TILE}")
    return None


def workspace_bytes(req: AttentionRequirements) -> int:
    """Partial results of split keys: float32 output, maximum and sum for each row, query head and segment; and two scales. Keys are split until the
    programs reach the aim, rounded up to a power of two, in 16 segments at least."""
    group = req.num_q_heads // req.num_kv_heads
    rows_a_block = max(1, 16 // group)
    padded = 1 << (req.head_dim - 1).bit_length()
    most = 0
    for rows in (min(req.max_num_tokens, req.max_num_seqs * (1 + req.num_draft_tokens)), 1):
        blocks = (rows // rows_a_block + req.max_num_seqs) * req.num_kv_heads if rows > 1 else req.num_kv_heads
        segments = max(16, min(MOST_SEGMENTS, 2 * MOST_PROGRAMS // blocks))
        most = max(most, rows * req.num_q_heads * segments * 4 * (padded + 2))
    return most + 8


def _device(platform: Platform) -> Unusable | None:
    if platform.vendor == "amd" and platform.device_type == "cuda" and platform.arch in FP8:
        return None
    found = f"{platform.device_name or platform.device_type} ({platform.arch})"
    return Unusable(reason=f"found {found}; wanted an AMD Instinct GPU of architecture {' or '.join(FP8)}")


def _version(platform: Platform) -> Version | None:
    return platform.library(MODULE, DISTRIBUTION)


def _provider(platform: Platform) -> str:
    version = _version(platform)
    return "aiter, version unknown" if version in (None, Version("0")) else f"aiter {version}"


def _library(platform: Platform) -> Unusable | None:
    """A build from source may know no version (0): `create` looks at its function."""
    version = _version(platform)
    if version is None:
        return Unusable(reason=f"found no aiter; wanted {OLDEST.base_version} or later", fix=FIX)
    if version != Version("0") and version < OLDEST:
        return Unusable(reason=f"found aiter {version}; wanted {OLDEST.base_version} or later", fix=FIX)
    return None


def _model(platform: Platform, req: AttentionRequirements) -> Unusable | None:
    return _dtypes(platform, req) or _shape(req) or _tree(req)


def _dtypes(platform: Platform, req: AttentionRequirements) -> Unusable | None:
    if req.q_dtype not in ("bfloat16", "float16"):
        return Unusable(reason=f"queries are {req.q_dtype}; wanted bfloat16 or float16", fix="--dtype bfloat16")
    fp8 = FP8[platform.arch]
    if req.kv_dtype not in (req.q_dtype, fp8):
        return Unusable(
            reason=f"KV is {req.kv_dtype}; wanted {req.q_dtype} or, on {platform.arch}, {fp8}",
            fix="--kv-cache-dtype auto",
        )
    return None


def _shape(req: AttentionRequirements) -> Unusable | None:
    if not SMALLEST_HEAD <= req.head_dim <= LARGEST_HEAD or req.head_dim % HEAD_MULTIPLE:
        wanted = f"a multiple of {HEAD_MULTIPLE} from {SMALLEST_HEAD} to {LARGEST_HEAD}"
        return Unusable(reason=f"head_dim is {req.head_dim}; wanted {wanted}")
    if req.num_q_heads % req.num_kv_heads:
        found = f"{req.num_q_heads} query heads on {req.num_kv_heads} KV heads"
        return Unusable(reason=f"found {found}; wanted a whole number of query heads per KV head")
    if req.page_size is not None and req.page_size not in PAGE_SIZES:
        wanted = " or ".join(map(str, PAGE_SIZES))
        return Unusable(reason=f"page size is {req.page_size}; wanted {wanted}", fix="--page-size 64")
    return None


def _tree(req: AttentionRequirements) -> Unusable | None:
    if not req.needs_tree:
        return None
    return Unusable(
        reason="a tree mask is asked for; the kernel's qq_bias is one tree for the whole batch, and it gives no log-sum-exp to merge two passes",
        fix="--speculative-eagle-topk 1",
    )
