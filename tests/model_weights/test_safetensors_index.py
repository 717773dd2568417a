"""Headers are believed only as far as the file bears them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from l4core.errors import CheckpointError
from l4core.model.safetensors_index import INDEX, read_folder, read_header

A = {"a": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "b": torch.zeros(4)}


def raw_shard(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=5),
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
    )
)
def test_header_gives_the_bytes_that_were_saved(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in wanted.items()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
    found, raw = read_header(path), path.read_bytes()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tuple(tensor.shape)
        want = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
        assert raw[found[name].start : found[name].stop] == bytes(want.flatten().tolist())


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "no sensible header length"),
        (b"GGUF\x03\x00\x00\x00\x00", "no sensible header length"),
        (raw_shard({"a": entry()})[:20], "the header has .* bytes and the file only 20: it is truncated"),
        (raw_shard(b"{not json"), "its header is not JSON"),
        (raw_shard([1]), "its header is a list"),
        (raw_shard(b'{"a": 1, "a": 2}'), "a name occurs twice"),
        (raw_shard({"a": {"dtype": "F32"}}), "the header entry of a is"),
        (raw_shard({"a": entry(shape=[-1])}), "the header entry of a is"),
        (raw_shard({"a": entry(shape=["1"])}), "the header entry of a is"),
        (raw_shard({"a": entry(offsets=(4, 0))}), "the header entry of a is"),
        (raw_shard({"a": entry(offsets=(0, 8))}, bytes(8)), r"a is F32 \[1\] = 4 bytes, its range has 8"),
        (raw_shard({"a": entry()}, bytes(3)), r"a ends at byte \d+ and the file at \d+: it is truncated"),
        (raw_shard({"a": entry(offsets=(4, 8))}, bytes(8)), "a begins at byte"),
        (raw_shard({"a": entry(), "b": entry()}, bytes(4)), "b begins at byte"),
        (raw_shard({"a": entry()}, bytes(9)), "its tensors end at byte"),
    ],
)
def test_a_damaged_shard_is_named_with_what_is_wrong(tmp_path: Path, raw: bytes, match: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{match}"):
        read_header(path)


def test_every_truncation_of_a_real_shard_is_found(tmp_path: Path) -> None:
    raw = save(A)
    path = tmp_path / "model.safetensors"
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            read_header(path)


def two_shards(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    save_file({"a": A["a"]}, folder / "one.safetensors")
    save_file({"b": A["b"]}, folder / "two.safetensors")
    given_map = {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": given_map}))
    return folder


def test_shards_of_an_index(tmp_path: Path) -> None:
    index = read_folder(two_shards(tmp_path))
    assert index.problems == ()
    assert index.shards == ("one.safetensors", "two.safetensors")
    assert {name: tensor.shard for name, tensor in index.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    assert index.file_bytes == sum((tmp_path / shard).stat().st_size for shard in index.shards)


def test_without_an_index_every_shard_is_read(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX).unlink()
    assert set(read_folder(tmp_path).tensors) == {"a", "b"}


def test_files_that_the_index_does_not_name_are_left_alone(tmp_path: Path) -> None:
    save_file(A, two_shards(tmp_path) / "consolidated.safetensors")
    assert read_folder(tmp_path).shards == ("one.safetensors", "two.safetensors")


@pytest.mark.parametrize(
    ("weight_map", "name", "text"),
    [
        (
            {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
            "c",
            f"c: {INDEX} puts it in two.safetensors, which does not hold it",
        ),
        (
            {"a": "two.safetensors", "b": "one.safetensors"},
            "a",
            f"a: {INDEX} puts it in two.safetensors, it is in one.safetensors",
        ),
        ({"a": "one.safetensors", "c": "two.safetensors"}, "b", f"b is in two.safetensors and not in {INDEX}"),
        (
            {"a": "one.safetensors", "b": "three.safetensors"},
            "three.safetensors",
            f"shard three.safetensors is named in {INDEX} and missing from the folder",
        ),
    ],
)
def test_an_index_that_disagrees_is_named(tmp_path: Path, weight_map: dict[str, str], name: str, text: str) -> None:
    problems = read_folder(two_shards(tmp_path, weight_map)).problems
    assert text in {problem.text for problem in problems if problem.name == name}


def test_a_missing_shard_is_one_problem_not_one_a_tensor(tmp_path: Path) -> None:
    (two_shards(tmp_path) / "two.safetensors").unlink()
    assert [problem.kind for problem in read_folder(tmp_path).problems] == ["shard"]


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    save_file(A, two_shards(tmp_path) / "two.safetensors")
    problems = read_folder(tmp_path).problems
    assert ("duplicate", "a is stored twice, in one.safetensors and two.safetensors") in {
        (p.kind, p.text) for p in problems
    }


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_unreadable_index_is_an_error(tmp_path: Path, text: str) -> None:
    (two_shards(tmp_path) / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="is not a safetensors index"):
        read_folder(tmp_path)


def test_an_index_cannot_point_out_of_the_folder(tmp_path: Path) -> None:
    two_shards(tmp_path, {"a": "../one.safetensors"})
    with pytest.raises(CheckpointError, match=r"names the shard '\.\./one\.safetensors'; wanted a file name"):
        read_folder(tmp_path)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        read_folder(tmp_path / "nowhere")
