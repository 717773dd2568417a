"""A backend asked for by name is taken or refused with its reason, never replaced; one that waits to be named is never chosen by itself."""

from __future__ import annotations

import logging

import pytest

from attention.entries import SMALL, make_entry, make_plugins
from l4core.attention.explain import explain
from l4core.attention.hints import FIRST_PARTY
from l4core.attention.select import candidates, select_backend
from l4core.errors import BackendUnavailable
from l4core.plugin_api import Tier, Unusable, Usable
from l4core.plugin_manager import load_plugins
from l4core.testing.platforms import fake_platform

OTHERS = ("l4-block-attention", *sorted({row.package for row in FIRST_PARTY}))
BUILTINS = load_plugins({"L4_DISABLE_PLUGINS": ",".join(OTHERS)})
CPU = fake_platform("cpu", {})


def test_a_named_backend_is_taken_whatever_its_tier() -> None:
    plugins = make_plugins(
        make_entry("best", Usable(tier=Tier.NATIVE)), make_entry("mine", Usable(tier=Tier.REFERENCE))
    )
    selected = select_backend(plugins, CPU, SMALL, device="cpu", named="mine")
    assert (selected.entry.name, selected.distribution, selected.version) == ("mine", "l4-mine", "1.2")
    assert explain(plugins, CPU, SMALL, named="mine").json()["chosen"] == "mine"


def test_a_named_backend_that_is_unusable_is_never_replaced() -> None:
    plugins = make_plugins(
        make_entry("mine", Unusable(reason="sm80 found; wanted sm90", fix="--device cpu")), make_entry("good")
    )
    with pytest.raises(
        BackendUnavailable, match=r"'mine' \(l4-mine 1.2\) is not usable here: sm80 found; wanted sm90"
    ) as caught:
        select_backend(plugins, CPU, SMALL, device="cpu", named="mine")
    assert caught.value.fix == "--device cpu"
    with pytest.raises(BackendUnavailable) as caught:  # a probe that knows no way out
        select_backend(make_plugins(make_entry("mine", Unusable(reason="no"))), CPU, SMALL, device="cpu", named="mine")
    assert caught.value.fix == "leave --attention-backend out; `l4 backends` lists what is usable"


@pytest.mark.parametrize(
    ("create", "reason", "fix"),
    [
        ("refuses", "libvendor 1.0 found; wanted 2.0", "pip install libvendor==2.0"),
        ("raises", "RuntimeError: no kernel image is available", ""),
        ("exits", "SystemExit: vendor library gave up", ""),
        ("returns_nonsense", "returned object; wanted an AttentionBackend", "tell the authors of l4-mine 1.2"),
        ("wrong", "smoke check 'decode': largest error", "choose another with --attention-backend"),
        ("nowhere", "cannot import 'attention.backends:nowhere': AttributeError", ""),
        ("no.such.module:create", "ModuleNotFoundError: No module named 'no'", ""),
    ],
)
def test_a_failing_create_ends_a_named_start_and_not_an_automatic_one(caplog, create, reason, fix) -> None:
    plugins = make_plugins(make_entry("mine", Usable(tier=Tier.NATIVE), create=create), make_entry("good"))
    with pytest.raises(BackendUnavailable, match=r"attention backend 'mine' \(l4-mine 1.2\)") as caught:
        select_backend(plugins, CPU, SMALL, device="cpu", named="mine")
    assert reason in caught.value.reason
    assert caught.value.fix == fix
    assert caplog.text == ""

    assert select_backend(plugins, CPU, SMALL, device="cpu").entry.name == "good"
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert reason in record.getMessage()
    assert record.getMessage().endswith("using good instead of mine")


def test_an_unknown_name_lists_what_there_is() -> None:
    plugins = make_plugins(make_entry("sdpa"), make_entry("reference"), failed="OSError: no ROCm")
    with pytest.raises(BackendUnavailable) as caught:
        select_backend(plugins, CPU, SMALL, device="cpu", named="sdqa")
    assert "'sdqa'; there are reference, sdpa" in caught.value.reason
    assert "plugin l4-dead 0.3 failed: OSError: no ROCm" in caught.value.reason
    assert caught.value.fix == "--attention-backend sdpa"
    for name, fix in (("fa3", "pip install l4-fa3"), ("qqqqq", "l4 backends")):
        with pytest.raises(BackendUnavailable) as caught:
            select_backend(plugins, CPU, SMALL, device="cpu", named=name)
        assert caught.value.fix == fix


def test_nothing_usable_lists_every_reason() -> None:
    plugins = make_plugins(
        make_entry("one", Unusable(reason="too cold", fix="heat it")),
        make_entry("two", create="raises"),
        failed="OSError: no ROCm",
    )
    with pytest.raises(BackendUnavailable, match="no attention backend is usable on cpu") as caught:
        select_backend(plugins, CPU, SMALL, device="cpu")
    for text in (
        "one (l4-one 1.2): too cold [heat it]",
        "RuntimeError: no kernel image",
        "plugin l4-dead 0.3 failed: OSError",
    ):
        assert text in caught.value.reason
    with pytest.raises(BackendUnavailable, match="no plugin offers one"):
        select_backend(make_plugins(), CPU, SMALL, device="cpu")


def test_a_backend_that_asks_to_be_named_is_never_chosen_by_itself() -> None:
    """Whatever its tier; and where it is all there is, the error says how to name it."""
    shy = make_entry("shy", Usable(tier=Tier.NATIVE, named_only=True, note="made for another device"))
    plain = make_entry("plain", Usable(tier=Tier.REFERENCE))
    plugins = make_plugins(shy, plain)
    assert [c.entry.name for c in candidates(plugins.attention_backends, CPU, SMALL) if c.chosen] == ["plain"]
    assert select_backend(plugins, CPU, SMALL, device="cpu").entry.name == "plain"
    assert select_backend(plugins, CPU, SMALL, device="cpu", named="shy").entry.name == "shy"
    assert "only when named · any page size · made for another device" in explain(plugins, CPU).text()
    with pytest.raises(BackendUnavailable, match=r"shy.*only when named.*--attention-backend shy"):
        select_backend(make_plugins(shy), CPU, SMALL, device="cpu")


def test_a_backend_that_asks_to_be_named_is_in_no_tie(caplog: pytest.LogCaptureFixture) -> None:
    shy = make_entry("shy", Usable(tier=Tier.PORTABLE, named_only=True))
    with caplog.at_level(logging.INFO, "l4core"):
        select_backend(make_plugins(shy, make_entry("plain")), CPU, SMALL, device="cpu")
    assert "tie" not in caplog.text
