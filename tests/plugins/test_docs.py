"""The plugin pages are true: every hook has its heading with its signature and a test, and every block of code runs."""

from __future__ import annotations

import dataclasses
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from experts.problem import make
from helpers.packages import pip_install
from l4core import hookspecs
from l4core.plugin_api import ChatTemplate, Sampler, Usable
from l4core.testing import conformance
from l4core.testing.conformance import ChatTemplateConformance, SamplerConformance
from l4core.testing.conformance.setup import LEVELS
from l4core.testing.platforms import FAKE_PLATFORMS
from plugins.site import Site

PAGES = Path(__file__).parents[2] / "docs" / "plugins"
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("l4_"))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return FENCE.findall((PAGES / page).read_text())


def write_files(page: str, folder: Path) -> list[str]:
    """Write the blocks that begin with "# file: PATH"; → their paths."""
    paths = []
    for _, text in blocks(page):
        if text.startswith("# file: "):
            path = text.split("\n", 1)[0].removeprefix("# file: ")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
            paths.append(path)
    return paths


def run_blocks(page: str) -> dict[str, Any]:
    """Run the other Python blocks of a page, one after the other, as one module; → its names."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for language, text in blocks(page):
        if language == "python" and not text.startswith("# file: "):
            exec(compile(text, page, "exec"), namespace)
    return namespace


# ---------------------------------------------------------------- hooks.md


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_signature(hook: str) -> None:
    signature = str(inspect.signature(getattr(hookspecs, hook))).replace("'", "")
    assert f"### `{hook}{signature}`" in (PAGES / "hooks.md").read_text()


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test(hook: str) -> None:
    assert f"def test_hook_{hook}(" in Path(__file__).with_name("test_plugin_manager.py").read_text()


def test_no_hook_is_documented_that_is_not_there() -> None:
    assert sorted(re.findall(r"^### `(l4_\w+)\(", (PAGES / "hooks.md").read_text(), re.MULTILINE)) == HOOKS


def test_the_examples_of_the_hooks_page_pass_their_kits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_blocks("hooks.md")
    sampler, template = page["TopNSigma"], page["PlainTemplate"]
    kits: list[Any] = [
        type(
            "Top", (SamplerConformance,), {"good_args": ({"n": 0.5}, {}), "bad_args": ({"n": 0}, {"m": 1}, {"n": "x"})}
        )(),
        type("Plain", (ChatTemplateConformance,), {})(),
    ]
    monkeypatch.setattr(kits[0], "make", lambda: made(sampler, Sampler))
    monkeypatch.setattr(kits[1], "make", lambda: made(template, ChatTemplate))
    type(kits[0]).sampler = "top-n-sigma"
    for kit in kits:
        tests = [name for name in dir(kit) if name.startswith("test_") and name != "test_entry_is_served_by_this_core"]
        assert len(tests) >= 6
        for name in tests:
            getattr(kit, name)()


def test_the_expert_kernel_of_the_hooks_page_computes_the_definition() -> None:
    kernel = run_blocks("hooks.md")["create"](None)
    assert make([2, 0, 2], 3).error(kernel) < 1e-5


def made(create: Any, base: type[Any]) -> Any:
    """What `create_object` does with an entry whose `create` names a class."""
    assert issubclass(create, base)
    return create()


# ---------------------------------------------------------------- the other pages


def test_the_index_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks("index.md")
    assert "l4core" in capsys.readouterr().out
    tables = [tomllib.loads(text) for language, text in blocks("index.md") if language == "toml"]
    assert [table["project"]["entry-points"]["l4core"] for table in tables] == [{"shout": "l4_shout"}]


def test_the_testing_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = run_blocks("testing.md")
    out = capsys.readouterr().out
    assert out.count("✓") == len(FAKE_PLATFORMS)
    assert "fakedev\ncalled a synchronizing operation" in out
    for name in ("TestProbe", "TestAttention", "TestSampler", "TestTemplate"):
        assert page[name].plugin == "l4core.builtin_plugins"
    page["TestProbe"]().test_probe_never_raises_and_refuses_with_a_reason()
    page["TestAttention"]().test_inputs_are_only_read()
    page["TestSampler"]().test_bad_arguments_are_value_errors()
    page["TestTemplate"]().test_tool_parser_does_not_depend_on_how_text_arrives()


def test_the_compatibility_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run_blocks("compatibility.md")
    assert "pip install --upgrade l4-old" in capsys.readouterr().out


def test_the_levels_are_those_of_the_kit() -> None:
    rows = re.findall(r"^\| ([A-Z]) \| ([^:|]+?)(?:: [^|]+)? \|$", (PAGES / "testing.md").read_text(), re.MULTILINE)
    assert dict(rows) == dict(LEVELS)


@pytest.mark.parametrize(
    "field", [f.name for f in dataclasses.fields(Usable) if f.name not in ("tier", "provider", "note")]
)
def test_every_field_of_a_verdict_is_in_the_tutorial(field: str) -> None:
    assert f"`{field}`" in (PAGES / "attention-backend.md").read_text()


@pytest.mark.parametrize("kit", [name for name in conformance.__all__ if name.endswith("Conformance")])
def test_every_kit_is_on_the_testing_page(kit: str) -> None:
    assert f"| `{kit}` |" in (PAGES / "testing.md").read_text()


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            file, _, anchor = target.partition("#")
            text = (PAGES / file).read_text()
            titles = {title.strip().lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
            assert not anchor or anchor in titles, f"{page.name}: {target}"


def test_the_sixth_backend_of_the_docs(tmp_path: Path, run_python) -> None:
    """attention-backend.md, file by file: pip installs it, it is found, selected, smoke-checked and passes its kits."""
    source, target = tmp_path / "source", tmp_path / "target"
    paths = write_files("attention-backend.md", source)
    assert paths == [
        "pyproject.toml",
        "l4_gather/__init__.py",
        "l4_gather/probe.py",
        "l4_gather/backend.py",
        "tests/test_conformance.py",
    ]
    pip_install(target, source)
    script = "\n".join(
        text
        for language, text in blocks("attention-backend.md")
        if language == "python" and not text.startswith("# file: ")
    )
    run_kits = f"""
import sys, pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", {str(source)!r}, {str(source)!r}]))
"""
    out = run_python(script + run_kits, target)
    assert "gather (l4-gather 0.1.0)" in out
    assert "failed" not in out
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 20
