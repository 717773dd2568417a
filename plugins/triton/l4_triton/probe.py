"""Where the kernels run: decided from plain data alone."""

from __future__ import annotations

from packaging.version import Version

from l4_triton.tiles import ARCHITECTURES, MAX_PROGRAMS, partial_bytes, tiles_for
from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable

OLDEST = Version("3.6")
Q_DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (16, 32, 64, 128, 256)


def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
    """Usable on the devices the kernels are compiled for. On a CPU only Triton's interpreter runs them: usable at the lowest tier, so never chosen
    unless named, and `create` then insists on TRITON_INTERPRET=1."""
    found = platform.library("triton")
    if found is None:
        return Unusable(reason="triton is not installed", fix=f"pip install 'triton>={OLDEST}'")
    if Version("0") < found < OLDEST:  # 0: installed, version unknown; create looks
        return Unusable(reason=f"triton {found}; wanted {OLDEST} or later", fix=f"pip install 'triton>={OLDEST}'")
    on_cpu = platform.device_type == "cpu"
    if not on_cpu and (platform.device_type != "cuda" or platform.arch not in ARCHITECTURES):
        return Unusable(
            reason=f"device {platform.device_type} of architecture {platform.arch}; wanted one of {', '.join(ARCHITECTURES)}",
            fix="--attention-backend sdpa",
        )
    refusal = _refuse(requirements)
    if refusal is not None:
        return refusal
    req = requirements
    rows = tiles_for("" if on_cpu else platform.arch, req.q_dtype, req.head_dim, req.kv_dtype).verify.block_m
    return Usable(
        tier=Tier.REFERENCE if on_cpu else Tier.TUNED,
        graph=not on_cpu,
        tree_mask=True,
        native_chunk=True,
        workspace_bytes=partial_bytes(MAX_PROGRAMS, rows, requirements.head_dim),
        provider=f"triton {found}",
        note="for tests, under Triton's interpreter: TRITON_INTERPRET=1" if on_cpu else "",
    )


def _refuse(req: AttentionRequirements) -> Unusable | None:
    if req.head_dim not in HEAD_DIMS:
        return Unusable(reason=f"head_dim {req.head_dim}; wanted one of {', '.join(map(str, HEAD_DIMS))}")
    if req.q_dtype not in Q_DTYPES:
        return Unusable(reason=f"queries are {req.q_dtype}; wanted {', '.join(Q_DTYPES)}", fix="--dtype bfloat16")
    if req.kv_dtype not in (req.q_dtype, "float8_e4m3fn"):
        return Unusable(
            reason=f"KV is {req.kv_dtype}; wanted float8_e4m3fn or that of the queries, {req.q_dtype}",
            fix="--kv-cache-dtype auto",
        )
    if req.num_q_heads % req.num_kv_heads:
        return Unusable(reason=f"{req.num_q_heads} query heads cannot share {req.num_kv_heads} KV heads evenly")
    return None
