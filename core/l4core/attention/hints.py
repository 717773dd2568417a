"""The packages that come with L4, and where each is the best choice. Only for hint lines ("pip install …"): selection never reads this."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from l4core.plugin_api import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstParty:
    """vendor: as in Platform.  archs: where it is the best, () = on every device of the vendor that no row above names."""

    package: str
    backend: str
    vendor: str
    archs: tuple[str, ...] = ()

    def fits(self, platform: Platform) -> bool:
        return platform.vendor == self.vendor and (not self.archs or platform.arch in self.archs)


FIRST_PARTY = (
    FirstParty(package="l4-trtllm-mha", backend="trtllm_mha", vendor="nvidia", archs=("sm100", "sm103")),
    FirstParty(package="l4-fa3", backend="fa3", vendor="nvidia", archs=("sm90",)),
    FirstParty(package="l4-aiter", backend="aiter", vendor="amd", archs=("gfx942", "gfx950")),
    FirstParty(package="l4-intel-xpu", backend="intel_xpu", vendor="intel"),
    FirstParty(package="l4-triton", backend="triton", vendor="nvidia"),
    FirstParty(package="l4-triton", backend="triton", vendor="amd"),
    FirstParty(package="l4-cpu", backend="cpu", vendor="cpu", archs=("x86_64",)),
)


def best_missing(platform: Platform, installed: Collection[str], usable: Collection[str]) -> FirstParty | None:
    """The best package for this platform that is not installed; None when a better or equal one is usable.

    installed, usable: names of backends that some plugin offers, and of those that can run here.
    """
    for package in FIRST_PARTY:
        if not package.fits(platform):
            continue
        if package.backend in usable:
            return None
        if package.backend not in installed:
            return package
    return None


def package_of(backend: str) -> str | None:
    """The package that offers a first-party backend, None for any other name."""
    return next((p.package for p in FIRST_PARTY if p.backend == backend), None)
