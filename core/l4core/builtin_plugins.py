"""The built-ins, through the door every plugin uses. Imports no torch: probes read plain data, and `create` names what to import later."""

from __future__ import annotations

from packaging.version import Version

from l4core.plugin_api import (
    PLUGIN_API,
    AttentionBackendEntry,
    AttentionRequirements,
    ChatTemplateEntry,
    DrafterEntry,
    ExpertKernelEntry,
    ExpertRequirements,
    ExpertsUsable,
    Platform,
    SamplerEntry,
    Tier,
    Unusable,
    Usable,
    hookimpl,
)

OLDEST_TRITON = Version("3.6")
FLOATS = ("float32", "bfloat16", "float16")
FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
QUANTISED = ("fp8_channel", "int4_g128")


@hookimpl
def l4_attention_backends() -> list[AttentionBackendEntry]:
    return [
        AttentionBackendEntry(
            name="reference", api=PLUGIN_API, probe=probe_reference, create="l4core.attention.reference:create"
        ),
        AttentionBackendEntry(name="sdpa", api=PLUGIN_API, probe=probe_sdpa, create="l4core.attention.sdpa:create"),
    ]


@hookimpl
def l4_expert_kernels() -> list[ExpertKernelEntry]:
    return [
        ExpertKernelEntry(
            name="torch", api=PLUGIN_API, probe=probe_torch_experts, create="l4core.experts.portable:create"
        ),
        ExpertKernelEntry(
            name="triton", api=PLUGIN_API, probe=probe_triton_experts, create="l4core.experts.fused:create"
        ),
        ExpertKernelEntry(
            name="torch_quantised",
            api=PLUGIN_API,
            probe=probe_torch_quantised,
            create="l4core.experts.quantised:create",
        ),
        ExpertKernelEntry(
            name="triton_int4",
            api=PLUGIN_API,
            probe=probe_triton_int4,
            create="l4core.experts.quantised_triton:create_int4",
        ),
        ExpertKernelEntry(
            name="triton_fp8",
            api=PLUGIN_API,
            probe=probe_triton_fp8,
            create="l4core.experts.quantised_triton:create_fp8",
        ),
    ]


@hookimpl
def l4_samplers() -> list[SamplerEntry]:
    return [SamplerEntry(name="default", api=PLUGIN_API, create="l4core.sampling.default:create")]


@hookimpl
def l4_chat_templates() -> list[ChatTemplateEntry]:
    return [
        ChatTemplateEntry(
            name="llama-4",
            api=PLUGIN_API,
            create="l4core.chat.llama4:create",
            stop_tokens=("<|eot|>", "<|eom|>", "<|end_of_text|>"),
        )
    ]


@hookimpl
def l4_drafters() -> list[DrafterEntry]:
    return [
        DrafterEntry(
            name="NGRAM",
            api=PLUGIN_API,
            create="l4core.sampling.ngram:create",
            options={
                "longest": "tokens of the longest ending to look for, default 4",
                "shortest": "tokens of the shortest ending that counts, default 2",
                "window": "tokens of a sequence to look in, its last ones, default 32768",
            },
        )
    ]


def probe_reference(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    """Any device torch knows, any page size, trees, fp8 KV, float64 too: the oracle that the others are checked against."""
    exact = (*FLOATS, "float64")
    refused = _refuse(requirements, exact, (*exact, *FP8), tree_mask=True)
    return refused or Usable(
        tier=Tier.REFERENCE,
        tree_mask=True,
        provider=f"torch {platform.torch_version}",
        note="the definition, one query row at a time: what others are compared with",
    )


def probe_sdpa(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    """Any device torch knows, KV in any float dtype (it is widened where it is read). PORTABLE everywhere, so a backend with kernels tuned for an
    accelerator wins there."""
    refused = _refuse(requirements, FLOATS, (*FLOATS, *FP8), tree_mask=False)
    return refused or Usable(tier=Tier.PORTABLE, provider=f"torch {platform.torch_version}")


def probe_torch_experts(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    """Any device torch knows, weights of the compute dtype."""
    formats = {requirements.weight_format, requirements.shared_format} - {"plain", None}
    if formats:
        return Unusable(reason=f"weights are {', '.join(map(str, formats))}; torch's experts take plain ones")
    return ExpertsUsable(tier=Tier.PORTABLE, graph=True, skips=True, provider=f"torch {platform.torch_version}")


def probe_triton_experts(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    """NVIDIA's and AMD's devices where triton is installed; plain weights."""
    return _triton_experts(platform, requirements, "plain")


def probe_triton_int4(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    """The same for 4-bit weights."""
    return _triton_experts(platform, requirements, "int4_g128")


def probe_triton_fp8(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    """The same for e4m3 weights, on devices that multiply them: NVIDIA's from SM89 on."""
    if not has_fp8(platform.arch):
        return Unusable(
            reason=f"{platform.arch} has no products of e4m3 numbers", fix="--expert-kernel torch_quantised"
        )
    return _triton_experts(platform, requirements, "fp8_channel")


def has_fp8(arch: str) -> bool:
    """Whether tensor cores of this NVIDIA architecture multiply e4m3."""
    return arch.startswith("sm") and arch[2:].isdigit() and int(arch[2:]) >= 89


def probe_torch_quantised(platform: Platform, requirements: ExpertRequirements) -> ExpertsUsable | Unusable:
    """Any device torch knows, weights in fewer bits."""
    if requirements.weight_format not in QUANTISED:
        return Unusable(reason=f"weights are {requirements.weight_format}; wanted {' or '.join(QUANTISED)}")
    return ExpertsUsable(tier=Tier.PORTABLE, graph=True, skips=True, provider=f"torch {platform.torch_version}")


def _triton_experts(platform: Platform, requirements: ExpertRequirements, kept: str) -> ExpertsUsable | Unusable:
    found = platform.library("triton")
    if found is None:
        return Unusable(reason="triton is not installed", fix=f"pip install 'triton>={OLDEST_TRITON}'")
    if Version("0") < found < OLDEST_TRITON:  # 0: installed, version unknown
        return Unusable(
            reason=f"triton {found}; wanted {OLDEST_TRITON} or later", fix=f"pip install 'triton>={OLDEST_TRITON}'"
        )
    if platform.device_type not in ("cuda", "xpu"):
        return Unusable(
            reason=f"device {platform.device_type}; wanted one Triton compiles for", fix="--expert-kernel torch"
        )
    if requirements.dtype not in FLOATS:
        return Unusable(reason=f"dtype is {requirements.dtype}; wanted one of {', '.join(FLOATS)}")
    formats = {requirements.weight_format, requirements.shared_format} - {kept, None}
    if formats:
        return Unusable(reason=f"weights are {', '.join(map(str, formats))}; these kernels take {kept} ones")
    rows = requirements.max_num_tokens
    itemsize = 4 if requirements.dtype == "float32" else 2
    return ExpertsUsable(
        tier=Tier.TUNED,
        graph=True,
        skips=True,
        workspace_bytes=rows * (3 * requirements.intermediate_size + requirements.hidden_size) * itemsize,
        provider=f"triton {found}",
    )


def _refuse(
    req: AttentionRequirements, q_dtypes: tuple[str, ...], kv_dtypes: tuple[str, ...], *, tree_mask: bool
) -> Unusable | None:
    """What the two torch backends cannot do; None when nothing of it is asked."""
    if req.q_dtype not in q_dtypes:
        return Unusable(
            reason=f"queries are {req.q_dtype}; wanted one of {', '.join(q_dtypes)}", fix="--dtype bfloat16"
        )
    if req.kv_dtype not in kv_dtypes:
        return Unusable(
            reason=f"KV is {req.kv_dtype}; wanted one of {', '.join(kv_dtypes)}", fix="--kv-cache-dtype auto"
        )
    if req.num_q_heads % req.num_kv_heads:
        return Unusable(
            reason=f"{req.num_q_heads} query heads on {req.num_kv_heads} KV heads; wanted a whole number of query heads per KV head"
        )
    if req.needs_tree and not tree_mask:
        return Unusable(
            reason="a tree mask is asked for; torch's attention takes none here", fix="--speculative-eagle-topk 1"
        )
    if req.needs_graph:
        return Unusable(
            reason="graph capture is asked for; this backend was never run inside one", fix="--disable-cuda-graph"
        )
    return None
