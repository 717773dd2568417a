"""How the kernels are compiled, and what is said where they cannot be or are not what their sources say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from l4_cpu import build_kernels
from l4_cpu.library import load
from l4core.plugin_api import BackendUnavailable


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build_kernels.CannotBuildError, match="no C\\+\\+ compiler"):
        build_kernels.build(tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "cxx"
    failing.write_text("#!/bin/sh\necho out of registers >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(build_kernels.CannotBuildError, match="out of registers"):
        build_kernels.build(tmp_path)
    assert not list(tmp_path.glob("*.so"))


def test_a_library_of_other_sources_is_refused(tmp_path: Path, built: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    source = tmp_path / "old.c"
    source.write_text('const char* l4_sources(void) { return "before"; }\n')
    library = build_kernels.library(built, tmp_path)
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    with pytest.raises(BackendUnavailable, match="other sources \\(before\\)"):
        load(built, tmp_path)


def test_what_is_no_library_is_refused(tmp_path: Path, built: str) -> None:
    build_kernels.library(built, tmp_path).write_bytes(b"nothing")
    with pytest.raises(BackendUnavailable, match="cannot be loaded"):
        load(built, tmp_path)
