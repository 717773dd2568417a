"""The kit for probes: pure, never raising, honest about what they were asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import ClassVar

from l4core import plugin_compat
from l4core.attention.verdicts import malformed
from l4core.plugin_api import (
    AttentionBackendEntry,
    AttentionRequirements,
    Platform,
    Tier,
    Unusable,
    Usable,
)
from l4core.testing.conformance.entry import find_entry
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform, requirement_grid

__all__ = ["ProbeConformance"]

HEAVY = ("torch", "numpy", "triton", "transformers")

_PURITY = """
import importlib, json, sys
plugin, backend, heavy = json.loads(sys.argv[1])
entries = importlib.import_module(plugin).l4_attention_backends()
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform, requirement_grid
requirements = list(requirement_grid())
for entry in entries:
    for name in FAKE_PLATFORMS:
        for requirement in requirements if entry.name == backend else ():
            entry.probe(fake_platform(name, {}), requirement)
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


class ProbeConformance:
    """Set `plugin` (import name of the module with the hooks) and `backend` (the entry's name). libraries: import name → version of what the
    probe looks for, so that it is tried with and without them."""

    plugin: ClassVar[str]
    backend: ClassVar[str]
    libraries: ClassVar[dict[str, str]] = {}

    @property
    def entry(self) -> AttentionBackendEntry:
        return find_entry(self.plugin, "l4_attention_backends", self.backend, AttentionBackendEntry)

    def machines(self) -> Iterator[tuple[str, Platform]]:
        """Every fake platform with nothing installed, with `libraries`, and with versions of them that are far too old."""
        sets = ({}, self.libraries, dict.fromkeys(self.libraries, "0.0.1")) if self.libraries else ({},)
        for name in FAKE_PLATFORMS:
            for libraries in sets:
                yield f"{name} with {libraries or 'nothing'}", fake_platform(name, libraries)

    def verdicts(self) -> Iterator[tuple[str, AttentionRequirements, object]]:
        entry, grid = self.entry, list(requirement_grid())
        for where, platform in self.machines():
            for requirements in grid:
                try:
                    verdict: object = entry.probe(platform, requirements)
                except Exception as error:
                    raise AssertionError(f"the probe raised on {where}: {error!r} for {requirements}") from error
                yield where, requirements, verdict

    def test_importing_and_probing_is_light(self) -> None:
        """Neither the module with the hooks nor its probe imports torch, numpy, triton or transformers."""
        argument = json.dumps([self.plugin, self.backend, HEAVY])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        done = subprocess.run(
            [sys.executable, "-c", _PURITY, argument], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == [], "imported by the plugin or its probe"

    def test_probe_never_raises_and_refuses_with_a_reason(self) -> None:
        for where, requirements, verdict in self.verdicts():
            assert isinstance(verdict, (Usable, Unusable)), f"{where}: {verdict!r}"
            if isinstance(verdict, Unusable):
                assert verdict.reason.strip(), f"{where}: refused {requirements} without a reason"

    def test_usable_verdicts_are_well_formed(self) -> None:
        """Tier, page sizes and stride are what core can read. (What was asked for and is not declared, core refuses by itself.)"""
        for where, requirements, verdict in self.verdicts():
            if isinstance(verdict, Usable):
                assert not list(malformed(verdict)), f"{where}, for {requirements}: {list(malformed(verdict))}"

    def test_probe_is_a_function_of_its_arguments(self) -> None:
        first = [verdict for _, _, verdict in self.verdicts()]
        assert first == [verdict for _, _, verdict in self.verdicts()]

    def test_an_unknown_architecture_is_never_native(self) -> None:
        """Exact architectures, never "at least": what does not exist yet cannot have been tried."""
        for where, platform in self.machines():
            strange = Platform(
                device_type=platform.device_type,
                vendor=platform.vendor,
                arch="sm9999" if platform.vendor == "nvidia" else "gfx9999",
                libraries=platform.libraries,
            )
            verdict = self.entry.probe(strange, next(requirement_grid()))
            assert not (isinstance(verdict, Usable) and verdict.tier == Tier.NATIVE), (
                f"{where}, but of arch {strange.arch}"
            )

    def test_entry_is_served_by_this_core(self) -> None:
        entry = self.entry
        assert entry.api in plugin_compat.served(), f"api {entry.api}; this core serves {plugin_compat.served()}"
        for key, text in entry.options.items():
            assert text.strip(), f"option {key!r} has no line of help"
