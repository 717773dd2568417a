"""Loading: every way a plugin can be broken becomes a row with its reason, and never stops another plugin."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import FrozenInstanceError

import pytest

from l4core import hookspecs
from l4core.errors import PluginError
from l4core.plugin_api import PLUGIN_API, Sampler
from l4core.plugin_checks import HOOKS
from l4core.plugin_manager import PluginRow, Plugins, create_object, import_object, load_plugins

SAMPLER_HEAD = "from l4core.plugin_api import *\nfrom l4core.plugin_api import hookimpl\n"


def row_of(plugins: Plugins, name: str) -> PluginRow:
    rows = [row for row in plugins.rows if row.name == name]
    assert len(rows) == 1, plugins.rows
    return rows[0]


def names(plugins: Plugins) -> set[str]:
    return {provided.entry.name for provided in plugins.samplers}


# ---------------------------------------------------------------- the good case


def test_builtins_come_through_the_entry_point() -> None:
    plugins = load_plugins({})
    assert {p.entry.name for p in plugins.attention_backends} >= {"reference", "sdpa"}
    assert {p.entry.name for p in plugins.chat_templates} >= {"llama-4"}
    assert names(plugins) >= {"default"}
    row = row_of(plugins, "l4core")
    assert (row.status, row.entry_point, row.reason) == ("loaded", "l4core.builtin_plugins", "")
    assert "attention backend sdpa" in row.offers
    assert {p.source for p in plugins.samplers if p.entry.name == "default"} == {f"l4core {row.version}"}


def test_a_third_party_plugin_is_found_with_its_distribution(site) -> None:
    site.install_good("l4-test-good", "good")
    plugins = load_plugins({})
    provided = next(p for p in plugins.samplers if p.entry.name == "good")
    assert (provided.distribution, provided.version) == ("l4-test-good", "1.0")
    assert row_of(plugins, "l4-test-good").offers == ("sampler good",)


def test_each_call_is_new_and_the_result_is_frozen(site) -> None:
    before = load_plugins({})
    site.install_good("l4-test-late", "late")
    assert "late" not in names(before)
    assert "late" in names(load_plugins({}))
    with pytest.raises(FrozenInstanceError):
        before.rows = ()  # type: ignore[misc]


def test_several_entry_points_of_one_distribution(site) -> None:
    points = "[l4core]\none = l4_test_one\ntwo = l4_test_two\n"
    site.install_good("l4-test-one", "one")
    (site.folder / "l4_test_one-1.0.dist-info" / "entry_points.txt").write_text(points)
    (site.folder / "l4_test_two.py").write_text((site.folder / "l4_test_one.py").read_text().replace("'one'", "'two'"))
    site.modules.append("l4_test_two")
    plugins = load_plugins({})
    assert names(plugins) >= {"one", "two"}
    offered = {row.entry_point: row.offers for row in plugins.rows if row.name == "l4-test-one"}
    assert offered == {"l4_test_one": ("sampler one",), "l4_test_two": ("sampler two",)}


# ---------------------------------------------------------------- broken plugins

ENTRY = 'SamplerEntry(name="x", api=1, create="json:loads")'
BROKEN = {
    "import error": (
        "import no_such_module_anywhere",
        "ModuleNotFoundError: No module named 'no_such_module_anywhere'",
    ),
    "error while importing": ("raise OSError('ROCm version file not found')", "OSError: ROCm version file not found"),
    "exit while importing": ("raise SystemExit('bye')", "SystemExit: bye"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "typo in a hook": (SAMPLER_HEAD + "@hookimpl\ndef l4_sampler():\n    return []\n", "unknown hook l4_sampler;"),
    "a wrapper": (
        SAMPLER_HEAD + "@hookimpl(wrapper=True)\ndef l4_samplers():\n    return (yield)\n",
        "l4_samplers is a hook wrapper",
    ),
    "an old-style wrapper": (
        SAMPLER_HEAD + "@hookimpl(hookwrapper=True)\ndef l4_samplers():\n    yield\n",
        "l4_samplers is a hook wrapper",
    ),
    "no hook": ("x = 1", "it has no hook"),
    "hook without its mark": ("def l4_samplers():\n    return []\n", "not marked with @hookimpl"),
    "unknown argument": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_samplers(platform):\n    return []\n",
        "PluginValidationError",
    ),
    "a hook that raises": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_samplers():\n    raise KeyError('oops')\n",
        "l4_samplers raised KeyError: 'oops'",
    ),
    "a hook that exits": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_samplers():\n    raise SystemExit(3)\n",
        "l4_samplers raised SystemExit: 3",
    ),
    "not a list": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_samplers():\n    return 7\n",
        "returned int; wanted a list or tuple",
    ),
    "a record not in a list": (
        SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return {ENTRY}\n",
        "returned SamplerEntry;",
    ),
    "a dict for a record": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_samplers():\n    return [{'name': 'x'}]\n",
        "returned a dict in its list; wanted SamplerEntry",
    ),
    "another hook's record": (
        SAMPLER_HEAD + f"@hookimpl\ndef l4_drafters():\n    return [{ENTRY}]\n",
        "returned a SamplerEntry in its list; wanted DrafterEntry",
    ),
    "empty name": (
        SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY.replace('x', '', 1)}]\n",
        "name is ''",
    ),
    "api is no integer": (
        SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY.replace('api=1', 'api=True')}]\n",
        "api is True",
    ),
    "create is no import string": (
        SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY.replace('json:loads', 'json.loads')}]\n",
        "create is 'json.loads'",
    ),
    "probe is no function": (
        SAMPLER_HEAD
        + "@hookimpl\ndef l4_attention_backends():\n    return [AttentionBackendEntry(name='x', api=1, probe=None, create='a:b')]\n",
        "probe is NoneType",
    ),
    "options is a list": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_attention_backends():\n"
        "    return [AttentionBackendEntry(name='x', api=1, probe=print, create='a:b', options=['y'])]\n",
        "options is not a mapping",
    ),
    "stop tokens is a string": (
        SAMPLER_HEAD + "@hookimpl\ndef l4_chat_templates():\n"
        "    return [ChatTemplateEntry(name='x', api=1, create='a:b', stop_tokens='<|eot|>')]\n",
        "stop_tokens is '<|eot|>'",
    ),
    "an API to come": (
        SAMPLER_HEAD
        + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY.replace('api=1', f'api={PLUGIN_API + 1}')}]\n",
        "pip install --upgrade l4core",
    ),
    "an API long gone": (
        SAMPLER_HEAD
        + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY.replace('api=1', f'api={PLUGIN_API - 2}')}]\n",
        "pip install --upgrade l4-test-broken",
    ),
    "a module whose __getattr__ breaks": (
        SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY}]\n"
        "def __getattr__(name):\n    raise ImportError(f'no {name} here') if name.startswith('l4_') else AttributeError(name)\n",
        "ImportError: no l4_attention_backends here",
    ),
    "a plugin that cannot be hashed": (
        SAMPLER_HEAD
        + "class Odd:\n    __hash__ = None\n    @hookimpl\n    def l4_samplers(self):\n        return []\nplugin = Odd()\n",
        "TypeError: unhashable type",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_plugin_is_a_row_and_stops_nobody(site, kind: str, caplog) -> None:
    source, reason = BROKEN[kind]
    points = "[l4core]\nx = l4_test_broken:plugin\n" if "plugin = " in source else None
    site.install_good("l4-test-before", "before")
    site.install("l4-test-broken", source, version="2.1", entry_points=points)
    site.install_good("l4-test-later", "later")
    with caplog.at_level(logging.WARNING, "l4core"):
        plugins = load_plugins({})
    row = row_of(plugins, "l4-test-broken")
    assert row.status == "failed"
    assert reason in row.reason
    assert (row.version, row.offers) == ("2.1", ())
    assert plugins.failures == (row,)
    assert names(plugins) >= {"default", "before", "later"}
    assert "x" not in names(plugins)
    assert "l4-test-broken 2.1" in caplog.text

    with pytest.raises(PluginError, match=r"l4-test-broken 2\.1") as caught:
        load_plugins({"L4_STRICT_PLUGINS": "1"})
    assert reason in str(caught.value)


def test_unreadable_entry_points_are_a_row_only_when_they_are_ours(site) -> None:
    site.install("l4-test-garbled", "", entry_points="[l4core]\nno equals sign here\n")
    site.install("other-garbled", "", entry_points="[console_scripts]\nno equals sign here\n")
    plugins = load_plugins({})
    assert "entry_points.txt cannot be read" in row_of(plugins, "l4-test-garbled").reason
    assert [row.name for row in plugins.failures] == ["l4-test-garbled"]


def test_a_distribution_without_metadata_does_not_hide_others(site) -> None:
    for name in ("l4_test_bare_a", "l4_test_bare_b"):
        site.install(name, "", module=name)
        (site.folder / f"{name}-1.0.dist-info" / "METADATA").unlink()
    assert len([row for row in load_plugins({}).failures if "no hook" in row.reason]) == 2


def test_a_distribution_that_is_on_the_path_twice_counts_once(site, tmp_path, monkeypatch) -> None:
    """An old copy further down the path: its module is shadowed, and so is its metadata."""
    site.install_good("l4-test-copy", "copied")
    shutil.copytree(site.folder, tmp_path / "old")
    old = tmp_path / "old"
    (old / "l4_test_copy-1.0.dist-info").rename(old / "l4_test_copy-0.9.dist-info")
    metadata = old / "l4_test_copy-0.9.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "0.9"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(old)])
    plugins = load_plugins({"L4_STRICT_PLUGINS": "1"})
    assert row_of(plugins, "l4-test-copy").version == "1.0"


def test_an_attention_backend_of_another_api_is_kept_to_say_so_itself(site) -> None:
    source = "@hookimpl\ndef l4_attention_backends():\n    return [AttentionBackendEntry(name='old', api=99, probe=print, create='a:b')]\n"
    site.install("l4-test-old", SAMPLER_HEAD + source)
    plugins = load_plugins({"L4_STRICT_PLUGINS": "1"})
    assert [p.entry.api for p in plugins.attention_backends if p.entry.name == "old"] == [99]


def test_one_module_in_two_distributions(site) -> None:
    site.install_good("l4-test-first", "shared")
    site.install("l4-test-second", "", entry_points="[l4core]\nx = l4_test_first\n")
    plugins = load_plugins({})
    assert "shared" in names(plugins)
    assert "already registered" in row_of(plugins, "l4-test-second").reason


def test_a_newer_hook_marked_optional_is_passed_over(site) -> None:
    hook = "\n@hookimpl(optionalhook=True)\ndef l4_telepathy():\n    raise AssertionError\n"
    site.install("l4-test-new", SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY}]\n" + hook)
    plugins = load_plugins({})
    assert row_of(plugins, "l4-test-new").status == "loaded"
    assert "x" in names(plugins)


# ---------------------------------------------------------------- names


def test_two_distributions_that_claim_one_name_both_lose_it(site) -> None:
    site.install_good("l4-test-a", "wanted")
    site.install_good("l4-test-b", "wanted")
    plugins = load_plugins({})
    assert "wanted" not in names(plugins)
    reasons = {row.name: row.reason for row in plugins.failures}
    assert set(reasons) == {"l4-test-a", "l4-test-b"}
    for reason in reasons.values():
        assert "sampler wanted is claimed twice (l4-test-a 1.0, l4-test-b 1.0); none of them is used" in reason
    with pytest.raises(PluginError, match=r"l4-test-a 1\.0, l4-test-b 1\.0"):
        load_plugins({"L4_STRICT_PLUGINS": "1"})
    assert "wanted" in names(load_plugins({"L4_DISABLE_PLUGINS": "l4-test-a", "L4_STRICT_PLUGINS": "1"}))


def test_a_builtin_keeps_its_name(site) -> None:
    site.install_good("l4-test-squatter", "default")
    plugins = load_plugins({})
    assert [p.distribution for p in plugins.samplers if p.entry.name == "default"] == ["l4core"]
    failure = next(row for row in plugins.failures if row.name == "l4-test-squatter")
    assert "l4core" in failure.reason
    assert "the built-in keeps the name" in failure.reason


def test_one_distribution_that_claims_a_name_twice(site) -> None:
    site.install("l4-test-twice", SAMPLER_HEAD + f"@hookimpl\ndef l4_samplers():\n    return [{ENTRY}, {ENTRY}]\n")
    plugins = load_plugins({})
    assert "x" not in names(plugins)
    assert all("claimed twice" in row.reason for row in plugins.failures)
    assert plugins.failures


# ---------------------------------------------------------------- switches


def test_names_are_compared_as_pip_compares_them(site) -> None:
    site.install("L4_Test.Caps", "raise RuntimeError('imported')", module="l4_test_caps")
    row = row_of(load_plugins({"L4_DISABLE_PLUGINS": "l4-test-caps"}), "L4_Test.Caps")
    assert row.status == "disabled"


@pytest.mark.parametrize("spelling", ["l4-test-off", "L4_Test.Off", " other , l4-test-off ", "l4_test_off"])
def test_a_disabled_plugin_is_not_even_imported(site, spelling: str) -> None:
    site.install("l4-test-off", "raise RuntimeError('imported')")
    row = row_of(load_plugins({"L4_DISABLE_PLUGINS": spelling, "L4_STRICT_PLUGINS": "1"}), "l4-test-off")
    assert (row.status, row.reason) == ("disabled", "named in L4_DISABLE_PLUGINS")


def test_disabling_what_is_not_there_is_said(caplog) -> None:
    with caplog.at_level(logging.WARNING, "l4core"):
        load_plugins({"L4_DISABLE_PLUGINS": "l4-no-such"})
    assert "'l4-no-such', which no installed plugin has" in caplog.text


def test_strict_must_be_0_or_1() -> None:
    with pytest.raises(PluginError, match="wanted 0 or 1"):
        load_plugins({"L4_STRICT_PLUGINS": "yes"})
    assert load_plugins({"L4_STRICT_PLUGINS": "0"}).rows


def test_a_source_tree_that_nobody_installed_says_so(run_python) -> None:
    code = """
        import importlib.metadata as m
        m.distributions = lambda **kw: iter(())
        from l4core.plugin_manager import load_plugins
        print(load_plugins({}).failures[0].reason)
    """
    assert "not installed" in run_python(code)


# ---------------------------------------------------------------- hooks


def test_every_hook_of_the_spec_is_called_and_no_other() -> None:
    specs = {name for name in vars(hookspecs) if name.startswith("l4_")}
    assert specs == set(HOOKS)
    assert {kind.field for kind in HOOKS.values()} <= set(Plugins.__dataclass_fields__)


def check_hook(site, hook: str, record: str, field: str, extra: str = "") -> None:
    source = (
        SAMPLER_HEAD + f'@hookimpl\ndef {hook}():\n    return ({record}(name="mine", api=1, create="a.b:c"{extra}),)\n'
    )
    site.install("l4-test-hook", source)
    found = getattr(load_plugins({"L4_STRICT_PLUGINS": "1"}), field)
    mine = [provided for provided in found if provided.distribution == "l4-test-hook"]
    assert [provided.entry.name for provided in mine] == ["mine"]


def test_hook_l4_attention_backends(site) -> None:
    check_hook(site, "l4_attention_backends", "AttentionBackendEntry", "attention_backends", ", probe=print")


def test_hook_l4_expert_kernels(site) -> None:
    check_hook(site, "l4_expert_kernels", "ExpertKernelEntry", "expert_kernels", ", probe=print")


def test_hook_l4_samplers(site) -> None:
    check_hook(site, "l4_samplers", "SamplerEntry", "samplers")


def test_hook_l4_chat_templates(site) -> None:
    check_hook(site, "l4_chat_templates", "ChatTemplateEntry", "chat_templates")


def test_hook_l4_drafters(site) -> None:
    check_hook(site, "l4_drafters", "DrafterEntry", "drafters")


# ---------------------------------------------------------------- creating what an entry names


def test_import_object_says_what_went_wrong() -> None:
    assert import_object("json:loads")("[1]") == [1]
    with pytest.raises(PluginError, match="cannot import 'json:nothing': AttributeError"):
        import_object("json:nothing")


def test_create_object_names_the_distribution(site) -> None:
    site.install_good("l4-test-good", "good")  # its create is json.loads, which wants an argument and makes no Sampler
    provided = next(p for p in load_plugins({}).samplers if p.entry.name == "good")
    with pytest.raises(PluginError, match=r"'good' of l4-test-good 1\.0: TypeError"):
        create_object(provided, Sampler)
    with pytest.raises(PluginError, match=r"returned list; wanted a Sampler"):
        create_object(provided, Sampler, "[]")
