"""Where this backend runs: decided from plain data alone."""

from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    if platform.device_type != "cpu":
        return Unusable(reason=f"device {platform.device_type}; this backend is for the CPU", fix="--device cpu")
    if requirements.kv_dtype not in ("float32", "bfloat16", "float16"):
        return Unusable(
            reason=f"KV is {requirements.kv_dtype}; wanted a 16- or 32-bit float", fix="--kv-cache-dtype auto"
        )
    if requirements.num_q_heads % requirements.num_kv_heads:
        return Unusable(
            reason=f"{requirements.num_q_heads} query heads cannot share {requirements.num_kv_heads} KV heads"
        )
    return Usable(tier=Tier.REFERENCE, note="an example; used only when named")
