"""Which Intel GPUs, libraries and models this backend takes: decided from plain data, no torch imported.

What is declared is what both libraries can do, so that whichever of them works at start-up fits the verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from packaging.version import Version

from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable

XE2 = ("bmg_g21", "bmg_g31", "lnl_m", "pvc")
BATTLEMAGE = ("bmg_g21", "bmg_g31")

IP_VERSIONS: Mapping[tuple[int, int], str] = {
    (12, 60): "pvc",
    (20, 1): "bmg_g21",
    (20, 2): "bmg_g31",
    (20, 4): "lnl_m",
    (30, 0): "ptl_h",
    (30, 1): "ptl_u",
}
"""Major and minor of a GPU's IP version → SYCL's name of the architecture."""

PAGE_SIZES = (64, 128)
PREFERRED_PAGE_SIZE = 64
HEAD_DIMS = (64, 128, 256, 512)
LARGEST_GROUP = 16
FP8 = "float8_e4m3fn"

MOST_XE_CORES = 128
HEAD_ROWS_PER_CORE = 128
"""Both libraries split keys until that many (row, query head) parts a core are in flight, and at least in two."""

FIX = "pip install vllm-xpu-kernels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A library with the kernels. module: its import name and the value of the option `provider`.  oldest: the first version whose rules were read.
    archs: what it has kernels for."""

    module: str
    oldest: str
    archs: tuple[str, ...]


PROVIDERS = (
    Provider(module="vllm_xpu_kernels", oldest="0.1.13", archs=XE2),
    Provider(module="sgl_kernel", oldest="0.11", archs=BATTLEMAGE),
)
"""In the order in which they are tried. `sgl_kernel` is also the name of NVIDIA's build, whose versions are below 0.11."""


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    refused = _device(platform) or _model(requirements)
    if refused is not None:
        return refused
    found, lacking = _libraries(platform)
    if not found:
        wanted = " or ".join(f"{p.module} {p.oldest}" for p in _candidates(platform))
        return Unusable(reason=f"found {lacking or 'neither library'}; wanted {wanted} or later", fix=FIX)
    return Usable(
        tier=Tier.NATIVE,
        page_sizes=PAGE_SIZES,
        preferred_page_size=PREFERRED_PAGE_SIZE,
        page_stride="dense",
        empty_rows=False,
        finite_tail=True,
        workspace_bytes=workspace_bytes(requirements),
        provider=found,
    )


def architecture(arch: str) -> str:
    """SYCL's name of an Intel architecture. torch gives a number whose upper bits are the IP version; an unknown one is returned as it is."""
    if not arch.isdecimal():
        return arch
    version = int(arch) >> 8
    return IP_VERSIONS.get((version >> 22, version >> 14 & 0xFF), arch)


def workspace_bytes(req: AttentionRequirements) -> int:
    """Partial results of split keys (output in the queries' 2 bytes, maximum and sum in float32), and the lengths of empty sequences."""
    rows = min(req.max_num_tokens, req.max_num_seqs * (1 + req.num_draft_tokens))
    head_rows = max(2 * rows * req.num_q_heads, HEAD_ROWS_PER_CORE * MOST_XE_CORES)
    return head_rows * (2 * req.head_dim + 8) + 4 * (req.max_num_seqs + 1)


def _device(platform: Platform) -> Unusable | None:
    arch = architecture(platform.arch)
    if platform.device_type == "xpu" and platform.vendor == "intel" and arch in XE2:
        return None
    found = f"{platform.device_name or platform.device_type} ({arch})"
    return Unusable(reason=f"found {found}; wanted an Intel GPU of architecture {', '.join(XE2)}")


def _candidates(platform: Platform) -> list[Provider]:
    return [p for p in PROVIDERS if architecture(platform.arch) in p.archs]


def _libraries(platform: Platform) -> tuple[str, str]:
    """("name version" of the first library that fits or "", the same of those that are too old). A version of 0 is not known: `create` looks."""
    too_old = []
    for provider in _candidates(platform):
        version = platform.library(provider.module)
        if version is None:
            continue
        if version == Version("0"):
            return f"{provider.module}, version unknown", ""
        if version >= Version(provider.oldest):
            return f"{provider.module} {version}", ""
        too_old.append(f"{provider.module} {version}")
    return "", ", ".join(too_old)


def _model(req: AttentionRequirements) -> Unusable | None:
    return _dtypes(req) or _shape(req) or _abilities(req)


def _dtypes(req: AttentionRequirements) -> Unusable | None:
    if req.q_dtype not in ("bfloat16", "float16"):
        return Unusable(reason=f"queries are {req.q_dtype}; wanted bfloat16 or float16", fix="--dtype bfloat16")
    if req.kv_dtype not in (req.q_dtype, FP8):
        return Unusable(reason=f"KV is {req.kv_dtype}; wanted {req.q_dtype} or {FP8}", fix="--kv-cache-dtype auto")
    return None


def _shape(req: AttentionRequirements) -> Unusable | None:
    if req.head_dim not in HEAD_DIMS:
        wanted = ", ".join(map(str, HEAD_DIMS))
        return Unusable(reason=f"head_dim is {req.head_dim}; the libraries' kernels are compiled for {wanted}")
    if req.num_q_heads % req.num_kv_heads or req.num_q_heads // req.num_kv_heads > LARGEST_GROUP:
        found = f"{req.num_q_heads} query heads on {req.num_kv_heads} KV heads"
        return Unusable(
            reason=f"found {found}; wanted a whole number of query heads per KV head, at most {LARGEST_GROUP}"
        )
    if req.page_size is not None and req.page_size not in PAGE_SIZES:
        wanted = " or ".join(map(str, PAGE_SIZES))
        return Unusable(reason=f"page size is {req.page_size}; wanted {wanted}", fix="--page-size 64")
    return None


def _abilities(req: AttentionRequirements) -> Unusable | None:
    if req.needs_tree:
        return Unusable(
            reason="a tree mask is asked for; the kernels take none, and two passes cannot be merged, for they give the log-sum-exp of "
            "unpaged keys only",
            fix="--speculative-eagle-topk 1",
        )
    if req.needs_graph:
        return Unusable(
            reason="graph capture is asked for; neither library promises that its kernels can be captured",
            fix="--disable-cuda-graph",
        )
    return None
