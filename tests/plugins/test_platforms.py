"""Fake machines are plain data."""

from __future__ import annotations

import pytest
from packaging.version import Version

from l4core.errors import ConfigError
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform, parse_libraries, requirement_grid


def test_each_name_is_a_different_machine() -> None:
    machines = [fake_platform(name, {}) for name in FAKE_PLATFORMS]
    assert len({m.arch for m in machines}) == len(FAKE_PLATFORMS)
    assert {m.vendor for m in machines} == {"cpu", "nvidia", "amd", "intel", "vnpu"}
    assert all(m.memory_bytes > 0 for m in machines)
    assert {m.device_type for m in machines} == {"cpu", "cuda", "xpu", "vnpu"}


def test_only_given_libraries_are_there() -> None:
    machine = fake_platform("sm90", {"triton": "3.7.1"})
    assert machine.library("triton") == Version("3.7.1")
    assert machine.library("pluggy") is None


def test_installed_libraries_are_those_of_this_machine() -> None:
    import pluggy

    machine = fake_platform("sm90")
    assert machine.library("pluggy") == Version(pluggy.__version__)
    assert machine.library("no_such_library_anywhere") is None


def test_an_unknown_machine_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown platform 'gfx94'") as caught:
        fake_platform("gfx94", {})
    assert caught.value.fix == "--platform gfx942"
    with pytest.raises(ConfigError, match="unknown platform"):
        fake_platform("qqqqqq", {})


def test_libraries_are_parsed_from_flags() -> None:
    assert parse_libraries(["flashinfer==0.7.2.post1", "aiter"]) == {
        "flashinfer": Version("0.7.2.post1"),
        "aiter": Version("0"),
    }
    with pytest.raises(ConfigError, match="wanted IMPORT_NAME==VERSION"):
        parse_libraries(["==1"])
    with pytest.raises(ConfigError, match="version 'new' of 'aiter' cannot be read"):
        parse_libraries(["aiter==new"])


def test_the_grid_asks_for_everything_once() -> None:
    grid = list(requirement_grid())
    assert len(set(grid)) == len(grid)
    assert {r.needs_graph for r in grid} == {r.needs_tree for r in grid} == {True, False}
    assert {r.page_size for r in grid} >= {None, 1, 64}
