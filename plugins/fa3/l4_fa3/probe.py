"""Where FlashAttention-3 runs, and with what: decided from plain data, no torch imported."""

from __future__ import annotations

from dataclasses import dataclass

from packaging.version import Version

from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable

HOPPER = ("sm90",)
OLDER = ("sm80", "sm86", "sm89")
"""FlashAttention-3 has kernels for these too. They are not what it was made for, so it runs there only when it is named."""

PAGE_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""No multiples of 128: there the kernel loads whole pages in prefill, and what lies past a sequence's end reaches the output as 0 · NaN. 128 was
measured to be no faster than 64."""
PREFERRED_PAGE_SIZE = 64

HEAD_DIMS = (64, 128, 192, 256)
MAX_NODES = 64
BLOCK_ROWS = 128
"""Query rows (packed over the heads of a group) of one tile of the kernel at head_dim 128."""

PARTIAL_BYTES = 128 << 20
"""Most memory for partial results of split keys; splits.py keeps to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A library that carries the kernels. module: its import name, and the value of the option `provider`.  distribution: the one whose versions
    are known; another that has the module counts as of unknown version.  oldest: the first version whose operators are known to fit.
    older_devices: was built with kernels for devices before Hopper."""

    module: str
    distribution: str
    oldest: str
    older_devices: bool = False


PROVIDERS = (
    Provider(module="flash_attn_interface", distribution="tokenspeed-fa3", oldest="3.0.0b1"),
    Provider(module="sgl_kernel", distribution="sglang-kernel", oldest="0.4", older_devices=True),
    Provider(module="vllm", distribution="vllm", oldest="0.26"),
)


def providers_for(arch: str) -> list[Provider]:
    """Those whose builds have kernels for this device, in the order in which they are tried."""
    return [provider for provider in PROVIDERS if arch in HOPPER or provider.older_devices]


def install(arch: str) -> str:
    """The command that gets a library for this device."""
    return f"pip install {providers_for(arch)[0].distribution}"


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    refused = _device(platform) or _model(platform, requirements)
    if refused is not None:
        return refused
    found, too_old = _libraries(platform)
    if not found:
        wanted = " or ".join(f"{p.module} {p.oldest}" for p in providers_for(platform.arch))
        return Unusable(
            reason=f"found {too_old or 'no build of FlashAttention-3'}; wanted {wanted} or later",
            fix=install(platform.arch),
        )
    named = platform.arch in OLDER
    return Usable(
        tier=Tier.TUNED if named else Tier.NATIVE,
        named_only=named,
        page_sizes=PAGE_SIZES,
        preferred_page_size=PREFERRED_PAGE_SIZE,
        graph=True,
        tree_mask=True,
        workspace_bytes=workspace_bytes(requirements),
        provider=found,
        note="made for Hopper; used on this device only when named" if named else "",
    )


def workspace_bytes(req: AttentionRequirements) -> int:
    """Most bytes of one step's plan and one attend beside q and out: partial results of split KV, log-sum-exps, fp8 queries, and for a tree the
    second pass with its merge."""
    rows, heads, dim = req.max_num_tokens, req.num_q_heads, req.head_dim
    lse = 4 * heads * rows
    queries = heads * dim * rows if req.kv_dtype.startswith("float8") else 0
    tree = 6 * (4 * heads * dim * rows) if req.needs_tree else 0
    metadata = 4 * 4 * (req.max_num_seqs + 4)
    return lse + queries + tree + PARTIAL_BYTES + metadata


def _device(platform: Platform) -> Unusable | None:
    if platform.vendor == "nvidia" and platform.arch in HOPPER + OLDER:
        return None
    found = f"{platform.device_name or platform.device_type} ({platform.arch})"
    return Unusable(reason=f"found {found}; FlashAttention-3 is for Hopper GPUs ({', '.join(HOPPER)})")


def _libraries(platform: Platform) -> tuple[str, str]:
    """("name version" of the first library that fits or "", the same of those that are too old)."""
    too_old = []
    for provider in providers_for(platform.arch):
        version = platform.library(provider.module, provider.distribution)
        if version is None:
            continue
        if version == Version(
            "0"
        ):  # installed without metadata, as a build from source is: `create` looks at its operators
            return f"{provider.module}, version unknown", ""
        if version >= Version(provider.oldest):
            return f"{provider.module} {version}", ""
        too_old.append(f"{provider.module} {version}")
    return "", ", ".join(too_old)


def _model(platform: Platform, req: AttentionRequirements) -> Unusable | None:
    if req.q_dtype not in ("bfloat16", "float16"):
        return Unusable(reason=f"queries are {req.q_dtype}; wanted bfloat16 or float16", fix="--dtype bfloat16")
    if req.kv_dtype not in (req.q_dtype, "float8_e4m3fn"):
        return Unusable(
            reason=f"KV is {req.kv_dtype}; wanted {req.q_dtype} or float8_e4m3fn", fix="--kv-cache-dtype auto"
        )
    if req.kv_dtype == "float8_e4m3fn" and req.q_dtype != "bfloat16":
        return Unusable(
            reason=f"KV is fp8 and queries are {req.q_dtype}; with fp8 the kernel writes bfloat16 only",
            fix="--dtype bfloat16",
        )
    if req.kv_dtype == "float8_e4m3fn" and platform.arch not in HOPPER:
        return Unusable(reason=f"KV is fp8 on {platform.arch}; wanted {HOPPER[0]}", fix="--kv-cache-dtype auto")
    if req.head_dim not in HEAD_DIMS:
        return Unusable(reason=f"head_dim is {req.head_dim}; wanted {', '.join(map(str, HEAD_DIMS))}")
    if req.num_q_heads % req.num_kv_heads:
        return Unusable(
            reason=f"{req.num_q_heads} query heads on {req.num_kv_heads} KV heads; wanted a whole number of query heads per KV head"
        )
    if req.needs_tree and req.num_draft_tokens >= MAX_NODES:
        return Unusable(
            reason=f"{req.num_draft_tokens} draft tokens in a tree; wanted at most {MAX_NODES - 1}",
            fix=f"--speculative-num-draft-tokens {MAX_NODES - 1}",
        )
    return None
