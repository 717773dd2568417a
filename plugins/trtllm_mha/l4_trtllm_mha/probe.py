"""Where TensorRT-LLM's attention kernels run: decided from plain data, no torch imported."""

from __future__ import annotations

from packaging.version import Version

from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable

BLACKWELL = ("sm100", "sm103")
SIBLING = ("sm90",)
"""FlashInfer serves these through other kernels (XQA): slower for prefill, no log-sum-exp. Used when named with the option sibling=xqa."""

OLDEST = "0.6.14"
"""The first FlashInfer whose signatures were read and run."""

PAGE_SIZES = (16, 32, 64)
"""Blackwell has a compiled kernel for each of these; larger pages go to another one that nobody has checked here."""
XQA_PAGE_SIZES = (16, 32, 64, 128)
PREFERRED_PAGE_SIZE = 64
HEAD_DIMS = (128,)
XQA_HEAD_DIMS = (64, 128)
MAX_NODES = 64
WORKSPACE_MB = 256
FIX = f'pip install "flashinfer-python>={OLDEST}" flashinfer-cubin'


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    if platform.vendor != "nvidia" or platform.arch not in BLACKWELL + SIBLING:
        found = f"{platform.device_name or platform.device_type} ({platform.arch})"
        return Unusable(reason=f"found {found}; wanted a Blackwell data-center GPU ({', '.join(BLACKWELL)})")
    sibling = platform.arch in SIBLING
    refused = _model(requirements, sibling)
    if refused is not None:
        return refused
    version = platform.library("flashinfer", "flashinfer-python")
    if version is None or version < Version(OLDEST):
        return Unusable(reason=f"flashinfer {version or 'is not installed'}; wanted {OLDEST} or later", fix=FIX)
    return Usable(
        tier=Tier.REFERENCE if sibling else Tier.NATIVE,
        named_only=sibling,
        page_sizes=XQA_PAGE_SIZES if sibling else PAGE_SIZES,
        preferred_page_size=PREFERRED_PAGE_SIZE,
        graph=True,
        tree_mask=not sibling,
        finite_tail=not sibling or requirements.kv_dtype.startswith("float8"),
        workspace_bytes=workspace_bytes(requirements),
        provider=f"flashinfer {version}" + (" (XQA)" if sibling else ""),
        note="not the hardware it is for: asks for --attention-option sibling=xqa" if sibling else "",
    )


def workspace_bytes(req: AttentionRequirements) -> int:
    """Most bytes: the scratch buffer, and of one attend a contiguous copy of the queries; for a tree both passes and their merge."""
    rows = req.max_num_tokens * req.num_q_heads * req.head_dim
    tree = 6 * 4 * rows if req.needs_tree else 0
    return (WORKSPACE_MB << 20) + 2 * 2 * rows + tree


def _model(req: AttentionRequirements, sibling: bool) -> Unusable | None:
    head_dims = XQA_HEAD_DIMS if sibling else HEAD_DIMS
    if req.q_dtype not in ("bfloat16", "float16"):
        return Unusable(reason=f"queries are {req.q_dtype}; wanted bfloat16 or float16", fix="--dtype bfloat16")
    if req.kv_dtype not in (req.q_dtype, "float8_e4m3fn"):
        return Unusable(
            reason=f"KV is {req.kv_dtype}; wanted {req.q_dtype} or float8_e4m3fn", fix="--kv-cache-dtype auto"
        )
    if req.head_dim not in head_dims:
        return Unusable(reason=f"head_dim is {req.head_dim}; wanted {', '.join(map(str, head_dims))}")
    if req.num_q_heads % req.num_kv_heads:
        return Unusable(
            reason=f"{req.num_q_heads} query heads on {req.num_kv_heads} KV heads; wanted a whole number of query heads per KV head"
        )
    if req.needs_tree and sibling:
        return Unusable(
            reason="a tree mask is asked for; the XQA kernels return no log-sum-exp to merge its two passes with",
            fix="--speculative-eagle-topk 1",
        )
    if req.needs_tree and req.num_draft_tokens >= MAX_NODES:
        return Unusable(reason=f"{req.num_draft_tokens} draft tokens in a tree; wanted at most {MAX_NODES - 1}")
    return None
