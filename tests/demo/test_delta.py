"""The trained data in checkpoints/smol-l4 is what was trained, and the build refuses anything else."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from l4core.demo.arch import LAYERS, is_nope_layer
from l4core.demo.build import CHECKOUT
from l4core.demo.delta import FILES, RANK_NOPE, RANK_ROPE, layer_deltas, load_delta, shapes
from l4core.errors import CheckpointError

SUMS = (CHECKOUT / "SHA256SUMS").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("line", SUMS)
def test_every_file_is_as_trained(line: str) -> None:
    digest, name = line.split()
    assert hashlib.sha256((CHECKOUT / name).read_bytes()).hexdigest() == digest


def test_every_data_file_has_a_digest() -> None:
    files = {p.name for p in CHECKOUT.iterdir() if p.suffix in {".safetensors", ".json"}}
    assert files == {line.split()[1] for line in SUMS}


def test_the_whole_is_small_enough_for_a_repository() -> None:
    assert sum(p.stat().st_size for p in CHECKOUT.rglob("*") if p.is_file()) < 100e6


def test_layers_take_their_own_rows() -> None:
    tensors = load_delta(CHECKOUT)
    layers = layer_deltas(tensors)
    assert len(layers) == LAYERS
    for index, layer in enumerate(layers):
        assert layer.q.a.shape[0] == (RANK_NOPE if is_nope_layer(index) else RANK_ROPE)
        assert torch.equal(layer.router, tensors["router"][index])
    assert torch.equal(layers[3].k.b, tensors["nope.k.B"][0])
    assert torch.equal(layers[4].k.b, tensors["rope.k.B"][3])


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A delta folder of zeros that can be damaged."""
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes().items()}
    first = {name: tensors.pop(name) for name in ("down.A", "down.B")}
    save_file(first, tmp_path / FILES[0])
    save_file(tensors, tmp_path / FILES[1])
    return tmp_path


def test_a_copy_loads_as_float32(copy: Path) -> None:
    assert {t.dtype for t in load_delta(copy).values()} == {torch.float32}


def test_a_missing_file(copy: Path) -> None:
    (copy / FILES[1]).unlink()
    with pytest.raises(CheckpointError, match=FILES[1]) as caught:
        load_delta(copy)
    assert "--delta" in caught.value.fix


def test_a_truncated_file(copy: Path) -> None:
    path = copy / FILES[1]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"{FILES[1]} cannot be read"):
        load_delta(copy)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"down.A": torch.zeros(1, 2)}, r"'down.A' has shape \(1, 2\); wanted \(30, 5, 12, 768\)"),
        ({"down.A": torch.zeros(30, 5, 12, 768)}, r"'down.B' has shape none; wanted \(30, 5, 576, 12\)"),
    ],
)
def test_wrong_and_missing_tensors(copy: Path, changed: dict[str, torch.Tensor], message: str) -> None:
    save_file(changed, copy / FILES[0])
    with pytest.raises(CheckpointError, match=message):
        load_delta(copy)


def test_an_unknown_tensor(copy: Path) -> None:
    tensors = {"down.A": torch.zeros(30, 5, 12, 768), "down.B": torch.zeros(30, 5, 576, 12), "extra": torch.zeros(1)}
    save_file(tensors, copy / FILES[0])
    with pytest.raises(CheckpointError, match=r"'extra' has shape .* wanted no such tensor"):
        load_delta(copy)
