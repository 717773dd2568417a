"""How a device's memory is shared out: one rule, for the engine's start-up and for `l4 plan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from l4core.errors import CapacityError
from l4core.platform import Platform, free_memory

RUNTIME_BYTES = 3 << 29
"""Of an accelerator: the driver's context, loaded kernels, the library workspaces of matrix products, and gaps between allocations."""
CPU_SHARE = 0.5
"""Of a host's free memory; pages are touched only when used, so an idle server stays small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that are not KV, on one device. weights, workspace (the attention backend's and the expert kernel's): held for life.
    step: most that one step holds at once.  graphs: captured decode steps.  tables: block tables."""

    weights: int
    workspace: int = 0
    step: int = 0
    graphs: int = 0
    tables: int = 0

    @property
    def static(self) -> int:
        """What `--mem-fraction-static` counts beside KV."""
        return self.weights + self.workspace

    @property
    def rest(self) -> int:
        """What must be left when weights and KV are in place, the runtime's own apart."""
        return self.step + self.graphs + self.tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """total: of the device.  kv: bytes that KV may take."""

    total: int
    needs: Needs
    kv: int

    @property
    def fraction(self) -> float:
        """Weights, workspace and KV as a share of the device: as `--mem-fraction-static` it gives this budget again."""
        return (self.needs.static + self.kv) / self.total

    @property
    def peak(self) -> int:
        """Most that will be allocated, when KV takes all it may; without the runtime's own memory."""
        return self.needs.static + self.kv + self.needs.rest

    def text(self) -> str:
        """One line for the start-up block."""
        needs = self.needs
        return (
            f"weights {_gb(needs.static)} + KV {_gb(self.kv)} = {self.fraction:.3f} of {_gb(self.total)} (--mem-fraction-static)"
            f" · a step {_gb(needs.step)}, tables {_gb(needs.tables)}, graphs {_gb(needs.graphs)}"
        )


def share_out(
    total: int, needs: Needs, fraction: float | None, free: int | None = None, *, runtime: int = RUNTIME_BYTES
) -> Budget:
    """An accelerator of `total` bytes, of which `free` can still be allocated (None = all but the runtime's, `runtime` bytes).

    fraction: weights, workspace and KV at most this share of the device; None = all that a step, its graphs and the runtime leave.
    Raises CapacityError when nothing is left for KV, or when the fraction leaves too little for a step.
    """
    usable = total - runtime if free is None else min(free, total - runtime)
    most = usable - needs.static - needs.rest
    if most <= 0:
        raise CapacityError(
            f"weights and workspace take {_gb(needs.static)} and a step {_gb(needs.rest)}; the device has {_gb(total)}, of which "
            f"{_gb(max(usable, 0))} can be used",
            fix="a larger device, more of them (--tp), or --quantization",
        )
    if fraction is None:
        return Budget(total=total, needs=needs, kv=most)
    budget = Budget(total=total, needs=needs, kv=int(total * fraction) - needs.static)
    best = math.floor((needs.static + most) / total * 1000) / 1000
    if budget.kv <= 0:
        raise CapacityError(
            f"weights and workspace take {_gb(needs.static)}, more than {fraction:g} of the device's {_gb(total)}",
            fix=f"--mem-fraction-static {best:.3f}, or leave it out",
        )
    if budget.kv > most:
        raise CapacityError(
            f"--mem-fraction-static {fraction:g} leaves {_gb(usable - needs.static - budget.kv)} of what can be used; a step, its tables and graphs "
            f"take {_gb(needs.rest)}",
            fix=f"--mem-fraction-static {best:.3f}, or leave it out, or a smaller --chunked-prefill-size",
        )
    return budget


def device_budget(platform: Platform, needs: Needs, fraction: float | None, *, sharing: int = 1) -> Budget:
    """`share_out` of this machine's device as it is now; on a CPU without a fraction, half of the memory that the weights leave free, and with one
    that share of the whole memory, whatever is free now: pages count when they are touched, and other programs come and go.

    sharing: ranks on this machine, which on a CPU have its memory in common.
    Call it before the weights are on the device. Raises CapacityError as `share_out` does.
    """
    free = free_memory(platform)
    if platform.device_type == "cpu":
        free //= sharing
    if platform.device_type == "cpu" and fraction is not None:
        return share_out(platform.memory_bytes // sharing, needs, fraction, runtime=RUNTIME_BYTES // sharing)
    if platform.device_type == "cpu":
        kv = int((free - needs.static - needs.rest) * CPU_SHARE)
        if kv <= 0:
            raise CapacityError(
                f"weights take {_gb(needs.static)} and a step {_gb(needs.rest)}; {_gb(free)} of memory are free",
                fix="a smaller model, or end other programs",
            )
        return Budget(total=platform.memory_bytes, needs=needs, kv=kv)
    return share_out(platform.memory_bytes, needs, fraction, free)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
