"""How a device is shared out between weights, KV and what a step needs."""

from __future__ import annotations

import pytest

from l4core.engine.start.memory_budget import RUNTIME_BYTES, Needs, device_budget, share_out
from l4core.errors import CapacityError
from l4core.platform import Platform, free_memory

GB = 10**9
NEEDS = Needs(weights=20 * GB, workspace=GB, step=2 * GB, graphs=GB, tables=GB // 2)


def test_by_default_kv_takes_what_a_step_and_the_runtime_leave() -> None:
    found = share_out(80 * GB, NEEDS, None)
    assert found.kv == 80 * GB - RUNTIME_BYTES - NEEDS.static - NEEDS.rest
    assert found.peak == 80 * GB - RUNTIME_BYTES
    assert share_out(80 * GB, NEEDS, found.fraction - 1e-9).kv == pytest.approx(found.kv, abs=100)


def test_a_fraction_bounds_weights_workspace_and_kv() -> None:
    found = share_out(80 * GB, NEEDS, 0.8)
    assert found.needs.static + found.kv == 64 * GB
    assert found.fraction == 0.8


def test_what_others_hold_on_the_device_counts() -> None:
    assert share_out(80 * GB, NEEDS, None, free=60 * GB).kv == 60 * GB - NEEDS.static - NEEDS.rest


def test_what_does_not_fit_names_the_flag_that_helps() -> None:
    with pytest.raises(CapacityError, match=r"take 21.00 GB and a step 3.50 GB; the device has 24.00 GB") as error:
        share_out(24 * GB, NEEDS, None)
    assert "--tp" in error.value.fix
    with pytest.raises(CapacityError, match=r"more than 0.2 of the device's 80.00 GB") as error:
        share_out(80 * GB, NEEDS, 0.2)
    best = float(error.value.fix.split()[1].rstrip(","))
    assert share_out(80 * GB, NEEDS, best).kv > 0
    with pytest.raises(CapacityError, match=r"0.99 leaves -?0.*a step, its tables and graphs take 3.50 GB") as error:
        share_out(80 * GB, NEEDS, 0.99)
    assert f"--mem-fraction-static {best:.3f}" in error.value.fix


def test_a_host_keeps_half_of_its_free_memory() -> None:
    cpu = Platform(
        device_type="cpu",
        vendor="cpu",
        arch="x86_64",
        memory_bytes=free_memory(Platform(device_type="cpu", vendor="cpu", arch="")),
    )
    assert device_budget(cpu, Needs(weights=0), None).kv == pytest.approx(cpu.memory_bytes / 2, rel=0.2)
    with pytest.raises(CapacityError, match="memory are free"):
        device_budget(cpu, Needs(weights=2 * cpu.memory_bytes), None)
