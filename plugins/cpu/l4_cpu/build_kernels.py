"""Compiles the kernels: `python -m l4_cpu.build_kernels`, and what `pip install` calls. Needs a C++17 compiler ($CXX, else c++, g++ or clang++).

One library an instruction set, from one source. A library is plain: a C ABI, no header of torch or Python, so it serves any version of either.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE = Path(__file__).parent
SOURCES = PACKAGE / "csrc"
COMPILERS = ("c++", "g++", "clang++")

_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
INSTRUCTIONS: Mapping[str, tuple[str, ...]] = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
"""Name, as in `Platform.runtime` → flags of the compiler."""


class CannotBuildError(Exception):
    """There is no compiler, it failed, or the kernels are not made for this machine; the text says which."""


def library(instructions: str, folder: Path = PACKAGE) -> Path:
    """Where the library of an instruction set is or would be."""
    return folder / f"kernels_{instructions}.so"


def sources_hash() -> str:
    """Of all that a library is compiled from; it is built in, so that one made of other sources is noticed."""
    digest = hashlib.sha256(repr(INSTRUCTIONS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def platform_tag() -> str:
    """Of a wheel with these libraries."""
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


def build(folder: Path = PACKAGE) -> list[Path]:
    """Compiles all libraries into `folder`; → their paths. A few seconds. Raises CannotBuildError."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        raise CannotBuildError(f"found {sys.platform} on {platform.machine()}; the kernels are for Linux on x86-64")
    compiler = _compiler()
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _compile(compiler, name, folder), INSTRUCTIONS))


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise CannotBuildError(f"no C++ compiler; looked for {', '.join(COMPILERS)} and $CXX")
    return [found]


def _compile(compiler: list[str], name: str, folder: Path) -> Path:
    """A library is put in its place whole: another process may be loading it."""
    out = library(name, folder)
    unfinished = out.with_name(f"{out.name}.{os.getpid()}")
    common = ["-std=c++17", "-O3", "-fPIC", "-shared", f'-DL4_SOURCES="{sources_hash()}"']
    command = [*compiler, *common, *INSTRUCTIONS[name], str(SOURCES / "kernels.cpp"), "-o", str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise CannotBuildError(f"{compiler[0]} does not run: {error}") from error
    if done.returncode != 0:
        raise CannotBuildError(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    unfinished.replace(out)
    return out


def main() -> None:
    try:
        for path in build():
            print(path)
    except CannotBuildError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
