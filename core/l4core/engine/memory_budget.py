"""How many bytes KV may take on a device: one rule, for the engine's start-up and for `l4 plan`."""

from __future__ import annotations

from l4core.errors import CapacityError
from l4core.platform import Platform, free_memory

DEFAULT_FRACTION = 0.88
"""Of an accelerator: the rest holds activations of one step and the runtime."""
CPU_SHARE = 0.5
"""Of a host's free memory; pages are touched only when used, so an idle server stays small."""


def kv_share(total: int, taken: int, fraction: float | None) -> int:
    """Bytes for KV on an accelerator of `total` bytes. taken: bytes of the weights and the attention backend's workspace.
    fraction: weights, workspace and KV at most this share of the device (`--mem-fraction-static`), None = DEFAULT_FRACTION.

    Raises CapacityError when what is taken alone passes the share.
    """
    share = DEFAULT_FRACTION if fraction is None else fraction
    budget = int(total * share) - taken
    if budget <= 0:
        least = taken / total
        raise CapacityError(
            f"weights and workspace take {taken / 1e9:.1f} GB, more than {share:.2f} of the device's {total / 1e9:.1f} GB",
            fix=f"--mem-fraction-static above {least:.2f}" if least < 0.97 else "a larger device, or a smaller model",
        )
    return budget


def kv_budget(platform: Platform, taken: int, fraction: float | None) -> int:
    """`kv_share` of this machine's device, and no more than is free; on a CPU without a fraction, half of the free memory."""
    if fraction is None and platform.device_type == "cpu":
        return int(free_memory(platform) * CPU_SHARE)
    return min(kv_share(platform.memory_bytes, taken, fraction), free_memory(platform))
