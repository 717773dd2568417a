"""Where a contract is derived from: a wheel, an unpacked folder or an installed distribution. Reads files; imports and runs none of them.

Signatures come from Python source by `ast`. Operator schemas come from the literal strings that TORCH_LIBRARY keeps in a compiled library, or
from the `def("…")` calls of C++ source. Imports no torch.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from l4core.errors import ConfigError

__all__ = ["Source", "find_function", "find_schema", "open_source"]

BLOCK = 1 << 24
LONGEST_SCHEMA = 1 << 14
CPP_SUFFIXES = (".cpp", ".cc", ".cu", ".cuh", ".h", ".hpp", ".sycl")
_DEF_CALL = re.compile(r'\bdef\(\s*((?:"(?:[^"\\]|\\.)*"\s*)+)')
_LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """origin: one line that says what was read, free of paths of this machine.  files: path inside the library → opens it for reading bytes."""

    library: str
    version: str
    origin: str
    files: Mapping[str, Callable[[], IO[bytes]]]

    def text(self, module: str) -> str | None:
        """Python source of a dotted module; None when the library has no such file."""
        stem = module.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in self.files:
                with self.files[path]() as file:
                    return file.read().decode()
        return None


def open_source(what: str) -> Source:
    """what: path of a wheel or of a folder that holds the package, or the name of an installed distribution. ConfigError when it is none."""
    path = Path(what)
    if path.suffix == ".whl" and path.is_file():
        return _wheel(path)
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): partial(_read, p) for p in sorted(path.rglob("*")) if p.is_file()}
        return Source(library=path.resolve().name, version="", origin="source tree", files=files)
    try:
        found = importlib.metadata.distribution(what)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"{what!r} is no wheel, no folder and no installed distribution",
            fix=f"pip download --no-deps {what}, then name the wheel",
        ) from None
    files = {p.as_posix(): partial(_read, Path(str(p.locate()))) for p in found.files or ()}
    return Source(library=what, version=found.version, origin="installed distribution", files=files)


def _read(path: Path) -> IO[bytes]:
    return path.open("rb")


def _wheel(path: Path) -> Source:
    archive = zipfile.ZipFile(path)
    library, version, *_ = path.name.split("-")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    files = {name: partial(archive.open, name) for name in archive.namelist() if not name.endswith("/")}
    return Source(
        library=library.replace("_", "-"), version=version, origin=f"{path.name}, sha256 {digest}", files=files
    )


# ---------------------------------------------------------------- signatures


def find_function(source: Source, name: str) -> str:
    """name: "module:function" → its parameters as text, "(q, k, causal=False)", annotations left out. ConfigError when it is not there."""
    module, _, function = name.partition(":")
    text = source.text(module)
    if text is None:
        raise ConfigError(f"{source.library} {source.version} has no module {module}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return f"({_parameters(node.args)})"
    raise ConfigError(f"module {module} of {source.library} {source.version} defines no function {function}")


def _parameters(args: ast.arguments) -> str:
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    return ast.unparse(args)


# ---------------------------------------------------------------- operator schemas


def find_schema(source: Source, name: str) -> str:
    """name: "namespace::op" → its schema, "op(Tensor q, …) -> Tensor", white space normalised. ConfigError when it is nowhere, or when several
    different schemas bear the name. Files that hold the namespace's name come first; a compiler may have dissolved a short one into code."""
    namespace, _, op = name.rpartition("::")
    held = [found for path in source.files for found in _schemas(source, path, namespace, op)]
    found = {_normal(text) for text, owned in held if owned} or {_normal(text) for text, _ in held}
    if len(found) == 1:
        return found.pop()
    count = f"{len(found)} schemas: {' | '.join(sorted(found))}" if found else "no schema"
    raise ConfigError(f"{source.library} {source.version} holds {count} of {name}; wanted one")


def _schemas(source: Source, path: str, namespace: str, op: str) -> Iterator[tuple[str, bool]]:
    """(schema, whether the file names the namespace)"""
    if path.endswith((".so", ".pyd")):
        with source.files[path]() as file:
            yield from _in_binary(file, namespace, op)
    elif path.endswith(CPP_SUFFIXES):
        with source.files[path]() as file:
            yield from _in_cpp(file.read().decode(errors="replace"), namespace, op)


def _in_binary(file: IO[bytes], namespace: str, op: str) -> Iterator[tuple[str, bool]]:
    """Literal strings, read block by block (some libraries are larger than a gigabyte)."""
    found: set[str] = set()
    owned, tail = False, b""
    while block := file.read(BLOCK):
        window = tail + block
        owned = owned or namespace.encode() in window
        found.update(_literals(window, op.encode() + b"("))
        tail = window[-LONGEST_SCHEMA:]
    return ((text, owned) for text in found if _is_schema(text, namespace, op))


def _literals(window: bytes, start: bytes) -> Iterator[str]:
    """Zero-terminated ASCII strings in which `start` occurs."""
    at = window.find(start)
    while at >= 0:
        first, last = window.rfind(b"\0", 0, at) + 1, window.find(b"\0", at)
        raw = window[first:last]
        if last > 0 and len(raw) < LONGEST_SCHEMA and raw.isascii():
            yield raw.decode()
        at = window.find(start, at + 1)


def _is_schema(text: str, namespace: str, op: str) -> bool:
    return re.match(rf"\s*(?:{re.escape(namespace)}::)?{re.escape(op)}\([^)]*.*\)\s*->", text, re.DOTALL) is not None


def _in_cpp(text: str, namespace: str, op: str) -> Iterator[tuple[str, bool]]:
    for match in _DEF_CALL.finditer(text):
        schema = "".join(_LITERAL.findall(match.group(1)))
        if _is_schema(schema, namespace, op):
            yield schema, namespace in text


def _normal(schema: str) -> str:
    """One space between words, none inside brackets, one after each comma: schemas written over many lines compare equal."""
    flat = " ".join(schema.split())
    flat = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", flat))
    flat = re.sub(r"\s*,\s*", ", ", flat)
    flat = re.sub(r"\s*=\s*", "=", flat)
    return re.sub(r"^\w+::", "", flat)
