"""How many bytes KV may take on this device."""

from __future__ import annotations

from l4core.errors import CapacityError
from l4core.platform import Platform, free_memory

DEFAULT_FRACTION = 0.88
"""Of an accelerator: the rest holds activations of one step, workspaces and the runtime."""
CPU_SHARE = 0.5
"""Of a host's free memory; pages are touched only when used, so an idle server stays small."""


def kv_budget(platform: Platform, taken: int, fraction: float | None) -> int:
    """Bytes for KV. taken: bytes of the weights and the attention backend's workspace.
    fraction: weights + KV at most this share of the device's memory (`--mem-fraction-static`), None = L4's own choice.

    Raises CapacityError when the weights alone pass the share.
    """
    if fraction is None and platform.device_type == "cpu":
        return int(free_memory(platform) * CPU_SHARE)
    share = DEFAULT_FRACTION if fraction is None else fraction
    budget = int(platform.memory_bytes * share) - taken
    if budget <= 0:
        least = taken / platform.memory_bytes
        raise CapacityError(
            f"weights and workspace take {taken / 1e9:.1f} GB, more than {share:.2f} of the device's {platform.memory_bytes / 1e9:.1f} GB",
            fix=f"--mem-fraction-static above {least:.2f}" if least < 0.97 else "a larger device, or a smaller model",
        )
    return min(budget, free_memory(platform))
