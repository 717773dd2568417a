"""Selection: the table of the design, guarded probes, refusals with reasons, names, options, page sizes, fallback under auto."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from attention import backends
from attention.entries import SMALL, make_entry, make_plugins
from l4core.attention.explain import RELEASED_LLAMA4, explain
from l4core.attention.hints import FIRST_PARTY
from l4core.attention.select import candidates, select_backend
from l4core.attention.verdicts import choose_page_size
from l4core.errors import ConfigError
from l4core.plugin_api import AttentionRequirements, Platform, Tier, Unusable, Usable
from l4core.plugin_entries import Plugins
from l4core.plugin_manager import load_plugins
from l4core.testing.platforms import FAKE_PLATFORMS, fake_platform

OTHERS = ("l4-block-attention", *sorted({row.package for row in FIRST_PARTY}))
BUILTINS = load_plugins({"L4_DISABLE_PLUGINS": ",".join(OTHERS)})
CPU = fake_platform("cpu", {})

# ---------------------------------------------------------------- the table of the design, with stand-ins for the hardware packages


def arch_probe(vendor, archs, library, minimum, tier):
    """A probe as the hardware packages write them: exact architectures, a library in range."""

    def probe(platform: Platform, requirements: AttentionRequirements) -> Usable | Unusable:
        if platform.vendor not in vendor or (archs and platform.arch not in archs):
            return Unusable(reason=f"{platform.arch} found; wanted {', '.join(archs) or ' or '.join(vendor)}")
        version = platform.library(library)
        if version is None or str(version) < minimum:
            return Unusable(reason=f"{library} {version}; wanted {minimum}", fix=f"pip install {library}")
        return Usable(tier=tier, provider=f"{library} {version}")

    return probe


@pytest.fixture
def house() -> Plugins:
    """The built-ins and a stand-in for each first-party package."""
    rows = (
        ("fa3", arch_probe(("nvidia",), ("sm90",), "fa3lib", "2", Tier.NATIVE)),
        ("trtllm_mha", arch_probe(("nvidia",), ("sm100", "sm103"), "flashinfer", "2", Tier.NATIVE)),
        ("aiter", arch_probe(("amd",), ("gfx942", "gfx950"), "aiter", "2", Tier.NATIVE)),
        ("intel_xpu", arch_probe(("intel",), (), "xpulib", "2", Tier.NATIVE)),
        ("triton", arch_probe(("nvidia", "amd"), (), "triton", "2", Tier.TUNED)),
        ("cpu", arch_probe(("cpu",), (), "kernels", "2", Tier.TUNED)),
    )
    made = [make_entry(name, probe=probe) for name, probe in rows]
    return Plugins(attention_backends=(*made, *BUILTINS.attention_backends))


NATIVE = {
    "sm90": ("fa3", "fa3lib"),
    "sm100": ("trtllm_mha", "flashinfer"),
    "sm103": ("trtllm_mha", "flashinfer"),
    "gfx942": ("aiter", "aiter"),
    "gfx950": ("aiter", "aiter"),
    "xpu": ("intel_xpu", "xpulib"),
}
TRITON = ("sm80", "sm89", "sm90", "sm100", "sm103", "sm120", "gfx942", "gfx950", "gfx1100")


@pytest.mark.parametrize("name", FAKE_PLATFORMS)
@pytest.mark.parametrize("native", ["present", "absent", "too old"])
@pytest.mark.parametrize("triton", ["present", "absent"])
def test_the_table(house: Plugins, name: str, native: str, triton: str) -> None:
    libraries = {"triton": "3.7"} if triton == "present" else {}
    if native != "absent":
        libraries |= dict.fromkeys(["fa3lib", "flashinfer", "aiter", "xpulib"], "2.5" if native == "present" else "1.9")
    if native == "present" and name in NATIVE:
        wanted = NATIVE[name][0]
    elif triton == "present" and name in TRITON:
        wanted = "triton"
    else:
        wanted = "sdpa"
    explanation = explain(house, fake_platform(name, libraries))
    assert explanation.json()["chosen"] == wanted
    assert f"✓ {wanted}" in explanation.text()
    assert json.loads(json.dumps(explanation.json()))["platform"]["arch"] == fake_platform(name, {}).arch
    refused = {c["name"]: c for c in explanation.json()["candidates"] if not c["usable"]}
    assert all(c["reason"] for c in refused.values())
    if native == "too old" and name in NATIVE:
        backend, library = NATIVE[name]
        assert refused[backend]["reason"] == f"{library} 1.9; wanted 2"
        assert f"pip install {library}" in explanation.text()


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("sm90", "l4-fa3"),
        ("sm100", "l4-trtllm-mha"),
        ("sm103", "l4-trtllm-mha"),
        ("gfx942", "l4-aiter"),
        ("gfx950", "l4-aiter"),
        ("xpu", "l4-intel-xpu"),
        ("sm80", "l4-triton"),
        ("sm89", "l4-triton"),
        ("sm120", "l4-triton"),
        ("gfx1100", "l4-triton"),
        ("cpu", "l4-cpu"),
        ("privateuse1", None),
    ],
)
def test_a_package_that_would_serve_better_is_named(house: Plugins, name: str, package: str | None) -> None:
    explanation = explain(BUILTINS, fake_platform(name, {}))
    assert explanation.hint == (
        f"{package} is made for {fake_platform(name).arch}: pip install {package}" if package else ""
    )
    everything = dict.fromkeys(["fa3lib", "flashinfer", "aiter", "xpulib", "triton"], "3")
    assert explain(house, fake_platform(name, everything)).hint == ""


def test_the_hint_passes_over_what_is_installed_but_not_usable(house: Plugins) -> None:
    """fa3 is there without its library: its own verdict says how to get that; the next best package is what is missing."""
    without_triton = [p for p in house.attention_backends if p.entry.name != "triton"]
    explanation = explain(Plugins(attention_backends=tuple(without_triton)), fake_platform("sm90", {}))
    assert explanation.hint == "l4-triton is made for sm90: pip install l4-triton"


def test_the_hint_does_not_name_what_is_worse_than_what_is_there() -> None:
    fa3 = make_entry("fa3", Usable(tier=Tier.NATIVE))
    assert explain(make_plugins(fa3), fake_platform("sm90", {})).hint == ""


def test_hint_table_names_each_backend_as_its_package() -> None:
    assert {row.package for row in FIRST_PARTY} == {f"l4-{row.backend.replace('_', '-')}" for row in FIRST_PARTY}


def test_a_vendors_own_device_reaches_sdpa_and_its_checks() -> None:
    """PrivateUse1: an unknown device type gets a backend without a change here. Run on the CPU in its stead."""
    vendor = fake_platform("privateuse1", {})
    assert vendor.device_type not in {"cpu", "cuda", "xpu"}
    assert select_backend(BUILTINS, vendor, SMALL, device="cpu").entry.name == "sdpa"


# ---------------------------------------------------------------- ranking


def test_highest_tier_wins_then_the_name_and_a_tie_is_logged(caplog) -> None:
    plugins = make_plugins(
        make_entry("zebra", Usable(tier=Tier.TUNED)),
        make_entry("slow", Usable(tier=Tier.REFERENCE)),
        make_entry("apple", Usable(tier=Tier.TUNED)),
        make_entry("never", Unusable(reason="no")),
    )
    assert [c.entry.name for c in candidates(plugins.attention_backends, CPU, SMALL)] == [
        "apple",
        "zebra",
        "slow",
        "never",
    ]
    with caplog.at_level(logging.INFO, "l4core"):
        assert select_backend(plugins, CPU, SMALL, device="cpu").entry.name == "apple"
    assert "apple, zebra tie at tier TUNED" in caplog.text


def test_the_order_of_installation_does_not_matter() -> None:
    entries = [make_entry(name, Usable(tier=Tier.TUNED)) for name in ("b", "a", "c")]
    for order in (entries, entries[::-1], entries[1:] + entries[:1]):
        assert [c.entry.name for c in candidates(order, CPU, RELEASED_LLAMA4)] == ["a", "b", "c"]


def test_running_on_the_reference_is_said_loudly(caplog) -> None:
    plugins = make_plugins(make_entry("reference", Usable(tier=Tier.REFERENCE)))
    select_backend(plugins, CPU, SMALL, device="cpu")
    assert "attention runs on reference: right, but slow" in caplog.text
    caplog.clear()
    select_backend(plugins, CPU, SMALL, device="cpu", named="reference")
    assert caplog.text == ""


def test_a_tree_that_leaves_only_the_reference_is_named_with_its_flag(caplog) -> None:
    """`l4 backends` knows nothing of the flag, and calls sdpa usable."""
    selected = select_backend(BUILTINS, CPU, replace(SMALL, needs_tree=True, num_draft_tokens=4), device="cpu")
    assert selected.entry.name == "reference"
    assert "sdpa" in caplog.text
    assert "--speculative-eagle-topk 1" in caplog.text


# ---------------------------------------------------------------- options, context, page size


def test_options_and_everything_else_reach_create() -> None:
    plugins = make_plugins(make_entry("mine", create="records_context", options={"splits": "how many"}))
    selected = select_backend(plugins, CPU, SMALL, device="cpu", options={"splits": "4"})
    context = backends.SEEN[-1]
    assert context.options == {"splits": "4"}
    assert (context.platform, context.requirements, context.device) == (CPU, SMALL, "cpu")
    assert context.page_size == selected.page_size == 8
    assert context.logger.name == "l4core.attention.mine"


@pytest.mark.parametrize("named", [None, "mine"])
def test_an_unknown_option_is_an_error(named) -> None:
    plugins = make_plugins(make_entry("mine", options={"splits": "how many"}))
    with pytest.raises(
        ConfigError, match=r"'split' is not an option of the attention backend 'mine' \(splits: how many\)"
    ):
        select_backend(plugins, CPU, SMALL, device="cpu", named=named, options={"split": "4"})


@pytest.mark.parametrize(
    ("asked", "sizes", "preferred", "chunk", "chosen"),
    [
        (None, None, 64, 8192, 64),
        (None, None, 64, None, 64),
        (16, None, 64, 8192, 16),
        (8192, None, 64, 8192, 8192),
        (None, (16, 32, 64), 32, 8192, 32),
        (None, (128, 256), 128, 8192, 128),
        (128, (64, 128), 64, 8192, 128),
        (None, None, 64, 96, 48),
        (None, None, 64, 7, 7),
        (None, (16, 64), 64, 32, 16),
        (None, (48, 128), 48, 512, 128),
    ],
)
def test_page_size(asked, sizes, preferred, chunk, chosen: int) -> None:
    verdict = Usable(tier=Tier.TUNED, page_sizes=sizes, preferred_page_size=preferred)
    assert choose_page_size(verdict, replace(RELEASED_LLAMA4, page_size=asked, chunk_size=chunk)) == chosen


def test_a_page_size_that_does_not_divide_the_chunk_is_the_users_error() -> None:
    with pytest.raises(
        ConfigError, match=r"page size 12 does not divide the attention chunk of 32\n  fix: --page-size 32"
    ):
        select_backend(make_plugins(make_entry("good")), CPU, replace(SMALL, page_size=12), device="cpu")


def test_two_selections_share_nothing() -> None:
    one, two = (select_backend(BUILTINS, CPU, SMALL, device="cpu") for _ in range(2))
    assert one.backend is not two.backend


def test_describe_has_all_a_start_up_line_needs() -> None:
    version = BUILTINS.rows[0].version
    selected = select_backend(BUILTINS, CPU, SMALL, device="cpu")
    assert selected.describe() == (
        f"sdpa (l4core {version}) · torch 2.13.0 · portable · l4-cpu is made for x86_64: pip install l4-cpu"
    )
    on_hopper = select_backend(BUILTINS, fake_platform("sm90", {}), SMALL, device="cpu")
    assert on_hopper.describe().endswith("· portable · l4-fa3 is made for sm90: pip install l4-fa3")


def test_explanation_quotes_failed_plugins() -> None:
    explanation = explain(make_plugins(failed="OSError: no ROCm"), CPU)
    assert "no plugin offers an attention backend" in explanation.text()
    assert "! plugin l4-dead 0.3 failed: OSError: no ROCm" in explanation.text()
    assert explanation.json()["failures"][0]["reason"] == "OSError: no ROCm"
    assert explanation.json()["chosen"] is None
