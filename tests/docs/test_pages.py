"""The pages hang together: links lead to files, commands and flags in them exist, decisions are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from l4core.cli.main import COMMANDS
from l4core.config import field_of

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("checkpoints/*/README.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def links(text: str) -> list[str]:
    """Targets inside the repository, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in found if not re.match(r"[a-z]+:|#", target)]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in links(read(name)):
        assert ((ROOT / name).parent / target).exists(), target


def test_links_are_found() -> None:
    assert links("[a](b.md#c) [d](https://x) [e](#f) ![g](h.png)") == ["b.md", "h.png"]


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_pages_exist(name: str) -> None:
    for command in re.findall(r"(?:^|`)l4 ([a-z][a-z-]+)", read(name), re.MULTILINE):
        assert command in COMMANDS


def test_flags_in_the_readme_exist() -> None:
    served = [line for line in read("README.md").splitlines() if line.startswith(("l4 serve", "python -m l4core"))]
    flags = {flag for line in served for flag in re.findall(r"--([a-z-]+)", line)}
    assert flags
    for flag in flags:
        field_of(flag)


def test_make_targets_in_the_pages_exist() -> None:
    makefile = read("Makefile")
    for name in NAMES:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", read(name), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name}: make {target}"


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("docs/decisions/")])
def test_decisions_are_short(name: str) -> None:
    assert len(read(name).splitlines()) <= 15


def test_every_room_is_in_the_architecture_page() -> None:
    page = read("docs/architecture.md")
    rooms = [p.name for p in (ROOT / "core" / "l4core").iterdir() if (p / "__init__.py").is_file()]
    missing = [
        room for room in rooms if f"`{room}/`" not in page and any((ROOT / "core" / "l4core" / room).glob("[!_]*.py"))
    ]
    assert missing == []


def test_the_glossary_has_the_words_of_the_contract() -> None:
    page = read("docs/glossary.md").lower()
    for word in (
        "cu_seqlens_q",
        "seq_lens",
        "block table",
        "slot",
        "page",
        "chunk",
        "prefill",
        "decode",
        "preempt",
        "virtual batch",
    ):
        assert word in page
