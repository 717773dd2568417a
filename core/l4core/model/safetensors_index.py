"""What a checkpoint folder holds, read from shard headers only: names, shapes, dtypes, byte ranges. No tensor byte is read here.

A shard is an 8-byte little-endian header length, a JSON header, then the tensors' bytes. Everything the header claims is checked against
the file, so that whoever maps the bytes later can trust the ranges. Problems are collected, not raised: `l4 check` lists all of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l4core.errors import CheckpointError
from l4core.model.boxes import Shape

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pth", ".pt", ".ckpt")
MAX_HEADER_BYTES = 100_000_000

ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing wrong with a checkpoint. kind: missing, unknown, shape, dtype, duplicate, index, shard, quantisation, tokenizer,
    template, text (tokenizer, template or defaults cannot be used) or config.
    name: the tensor or file at fault.  text: the whole sentence, which holds the name."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of the checkpoint. dtype: safetensors' name.  start, stop: byte range in the shard file; 0, 0 in a manifest without files."""

    name: str
    shape: Shape
    dtype: str
    shard: str = ""
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderIndex:
    """tensors: by name. shards: file names read, in order. file_bytes: their sizes together. problems: what the headers and the index get wrong."""

    folder: Path
    tensors: Mapping[str, StoredTensor]
    shards: tuple[str, ...]
    file_bytes: int
    problems: tuple[Problem, ...]


def read_folder(folder: Path) -> FolderIndex:
    """Headers of all shards of a checkpoint folder: those the index names, or every *.safetensors file where there is no index.

    Raises CheckpointError when the folder holds no safetensors at all (pickled files are named and refused).
    """
    index = _read_index(folder)
    present = sorted({path.name for path in folder.glob("*.safetensors")} if index is None else set(index.values()))
    if not present:
        raise _no_tensors(folder)
    tensors: dict[str, StoredTensor] = {}
    problems: list[Problem] = []
    file_bytes = 0
    for shard in present:
        path = folder / shard
        if not path.is_file():
            problems.append(_problem("shard", shard, f"shard {shard} is named in {INDEX} and missing from the folder"))
            continue
        try:
            found = read_header(path)
        except CheckpointError as error:
            problems.append(_problem("shard", shard, error.message))
            continue
        file_bytes += path.stat().st_size
        for name, tensor in found.items():
            if name in tensors:
                where = f"{tensors[name].shard} and {shard}"
                problems.append(_problem("duplicate", name, f"{name} is stored twice, in {where}"))
            else:
                tensors[name] = tensor
    problems += _disagreements(index or {}, tensors, {p.name for p in problems if p.kind == "shard"})
    return FolderIndex(
        folder=folder, tensors=tensors, shards=tuple(present), file_bytes=file_bytes, problems=tuple(problems)
    )


def shards_of_index(folder: Path) -> list[str] | None:
    """Shard files that the index of a folder names, None when it has no index. Raises CheckpointError for a damaged one."""
    index = _read_index(folder)
    return None if index is None else sorted(set(index.values()))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one shard. Raises CheckpointError when the file is not safetensors, is truncated, or its header contradicts itself."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            raise _damaged(path, f"its first 8 bytes give no sensible header length ({size} bytes in all)")
        text = file.read(length)
    if len(text) < length:
        raise _damaged(path, f"the header has {length} bytes and the file only {size}: it is truncated")
    try:
        header = json.loads(text, object_pairs_hook=_no_duplicates)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}, not an object")
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    _check_ranges(path, tensors, 8 + length, size)
    return tensors


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a name occurs twice among {sorted(found)[:3]} …")
    return found


def _entry(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers_ok = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(path, f"the header entry of {name} is {entry!r}; wanted dtype, shape, data_offsets") from error
    if not numbers_ok or stop < start or not isinstance(dtype, str):
        raise _damaged(path, f"the header entry of {name} is {entry!r}; wanted dtype, shape, data_offsets")
    item = ITEM_SIZES.get(dtype)
    if item is not None and math.prod(shape) * item != stop - start:
        raise _damaged(
            path, f"{name} is {dtype} {list(shape)} = {math.prod(shape) * item} bytes, its range has {stop - start}"
        )
    return StoredTensor(
        name=name, shape=shape, dtype=dtype, shard=path.name, start=data_start + start, stop=data_start + stop
    )


def _check_ranges(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    position = data_start
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.stop > size:
            raise _damaged(path, f"{tensor.name} ends at byte {tensor.stop} and the file at {size}: it is truncated")
        if tensor.start != position:
            raise _damaged(
                path, f"{tensor.name} begins at byte {tensor.start}, the tensor before it ends at {position}"
            )
        position = tensor.stop
    if position != size:
        raise _damaged(path, f"its tensors end at byte {position} and the file at {size}")


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name → shard file name, or None when the folder has no index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors index ({error!r}); wanted a JSON object with weight_map",
            fix="copy or download the file again",
        ) from error
    outside = next((shard for shard in entries.values() if Path(shard).name != shard), None)
    if outside is not None:
        raise CheckpointError(f"{path} names the shard {outside!r}; wanted a file name inside the folder")
    return entries


def _disagreements(index: Mapping[str, str], tensors: Mapping[str, StoredTensor], unread: set[str]) -> list[Problem]:
    """Where the index and the headers say different things. Shards that could not be read are already named."""
    problems = []
    for name, shard in index.items():
        found = tensors.get(name)
        if found is None and shard not in unread:
            problems.append(_problem("index", name, f"{name}: {INDEX} puts it in {shard}, which does not hold it"))
        elif found is not None and found.shard != shard:
            problems.append(_problem("index", name, f"{name}: {INDEX} puts it in {shard}, it is in {found.shard}"))
    if index:
        problems += [
            _problem("index", name, f"{name} is in {tensor.shard} and not in {INDEX}")
            for name, tensor in tensors.items()
            if name not in index
        ]
    return problems


def _no_tensors(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is not a folder; wanted a checkpoint folder with *.safetensors")
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return CheckpointError(
            f"{folder} holds no *.safetensors, only {', '.join(pickled[:3])}: pickled weights can run code and are never opened",
            fix="load them with transformers where you trust them and save_pretrained(DIR), which writes safetensors",
        )
    return CheckpointError(
        f"{folder} holds no weights (*.safetensors)",
        fix="give the folder that has the shards, or --load-format dummy for random weights",
    )


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path.name}: {what}", fix="copy or download the file again")


def _problem(kind: str, name: str, text: str) -> Problem:
    return Problem(kind=kind, name=name, text=text)
