"""Scripts that no test runs and no type checker reads, and commands in pages: the modules and names that they take from this repository exist."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {path.name: path for path in (*ROOT.glob("core/l4core"), *ROOT.glob("plugins/*/l4_*")) if path.is_dir()}
SCRIPTS = sorted(
    str(p.relative_to(ROOT)) for p in (*ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("checkpoints/**/*.py"))
)
TEXTS = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.*"))
    if p.suffix in ("", ".md", ".py", ".sh")
)


def file_of(module: str) -> Path | None:
    """A module's file, or its package's `__init__.py`; None when there is none."""
    top, *rest = module.split(".")
    path = PACKAGES[top].joinpath(*rest)
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


@functools.cache
def names_of(path: Path) -> frozenset[str]:
    """What a module defines or imports at its top, and what its `__all__` says (a package may import it when asked)."""
    return frozenset(_names(ast.parse(path.read_text()).body))


def _names(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Import() | ast.ImportFrom():
                yield from (alias.asname or alias.name for alias in node.names)
            case ast.Assign() | ast.AnnAssign():
                yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
                yield from (c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str))
            case ast.If():
                yield from _names(node.body + node.orelse)
            case ast.Try():
                yield from _names(node.body)
            case _:
                pass


def missing(source: str) -> list[str]:
    """Imports of our packages in a script, anywhere in it, that lead nowhere."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            assert node.module is not None
            path = file_of(node.module)
            if path is None:
                found.append(node.module)
                continue
            names = (alias.name for alias in node.names)
            found += [
                f"{node.module}.{n}" for n in names if n not in names_of(path) and not file_of(f"{node.module}.{n}")
            ]
        elif isinstance(node, ast.Import):
            ours = (alias.name for alias in node.names if alias.name.partition(".")[0] in PACKAGES)
            found += [name for name in ours if not file_of(name)]
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_a_script_imports_exists(name: str) -> None:
    assert missing((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", TEXTS)
def test_modules_that_are_run_exist(name: str) -> None:
    for module in re.findall(r"""-m[ "',]+(l4(?:core|_\w+)(?:\.\w+)*)""", (ROOT / name).read_text()):
        if module.partition(".")[0] in PACKAGES:
            path = file_of(module)
            assert path is not None, module
            assert path.name != "__init__.py" or path.with_name("__main__.py").is_file(), module


def test_files_that_texts_name_exist() -> None:
    """A path with a folder in it, as `engine/engine.py`, is the end of a file's path."""
    files = [
        p for folder in ("core", "plugins", "tests", "benchmarks", "examples") for p in ROOT.glob(f"{folder}/**/*.py")
    ]
    ends = {"/".join(file.parts[start:]) for file in files for start in range(len(ROOT.parts), len(file.parts))}
    for text in (*ROOT.glob("core/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        for named in re.findall(r"(?<![\w/.$}*<-])((?:[\w-]+/)+\w+\.py)\b", text.read_text()):
            assert named in ends, f"{text.relative_to(ROOT)} names {named}"


def test_a_stale_import_is_seen() -> None:
    stale = "def f():\n    from l4core.testing.models.checkpoints import BENCH, gone\n    import l4core.nowhere\n"
    assert missing(stale) == ["l4core.testing.models.checkpoints.gone", "l4core.nowhere"]
    assert missing("from l4core.testing import conformance_setup\nfrom l4core import LLM") == [
        "l4core.testing.conformance_setup"
    ]
