"""The contract does not change by accident: signatures of all public modules are kept in api.txt."""

from __future__ import annotations

from l4core import plugin_compat
from l4core.plugin_api import PLUGIN_API
from plugins.dump_api import DUMP, dump


def test_public_signatures_are_those_of_the_dump() -> None:
    """A change that was meant: `python tests/plugins/dump_api.py --write`, and PLUGIN_API raised if plugins must know."""
    now, kept = dump(), DUMP.read_text()
    assert now.splitlines() == kept.splitlines(), "run `python tests/plugins/dump_api.py --write` if this was meant"
    assert f"PLUGIN_API = {PLUGIN_API}" in kept


def test_this_core_serves_its_api_and_the_one_before() -> None:
    assert plugin_compat.served(1) == (1,)
    assert plugin_compat.served(2) == (2, 1)
    assert plugin_compat.served(7) == (7, 6)


def test_what_is_not_served_says_what_to_upgrade() -> None:
    for api in (6, 7):
        assert plugin_compat.refusal(api, "l4-x", "0.1", current=7) is None
    old, new = plugin_compat.refusal(5, "l4-x", "0.1", current=7), plugin_compat.refusal(8, "l4-x", "0.1", current=7)
    assert old is not None
    assert new is not None
    assert old.reason == "l4-x 0.1 is written for plugin API 5, older than this core serves; wanted 7 or 6"
    assert old.fix == "pip install --upgrade l4-x"
    assert new.reason == "l4-x 0.1 is written for plugin API 8, newer than this core serves; wanted 7 or 6"
    assert new.fix == "pip install --upgrade l4core"
