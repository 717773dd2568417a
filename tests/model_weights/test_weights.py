from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_folder import (
    Tensors,
    as_stored,
    empty_parameters,
    hf_tensors,
    prefixed,
    split_experts,
    tiny_config,
    whole_parameters,
    write_checkpoint,
)

from l4core.errors import CheckpointError, NotBuiltError
from l4core.model import weights
from l4core.model.weights import fill_dummy, load_weights
from l4core.parallel.ranks import Ranks
from l4core.testing.ranks.threads import run_ranks

CONFIG = tiny_config()
Q0 = "model.layers.0.self_attn.q_proj.weight"


def full_names(**kw: Any) -> Tensors:
    return prefixed(hf_tensors(CONFIG, **kw), wrapped=False)


def params_for(tensors: Tensors, **kw: Any) -> Tensors:
    return empty_parameters(CONFIG, as_stored(tensors), **kw)


def load(folder: Path, params: Tensors, **kw: Any) -> weights.LoadReport:
    return load_weights(params, folder, CONFIG, progress=False, **kw)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("one_each", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_parameter_is_what_the_checkpoint_says(
    tmp_path: Path, wrapped: bool, one_each: bool, shards: int
) -> None:
    tensors = prefixed(hf_tensors(CONFIG, one_each=one_each), wrapped=wrapped)
    params = params_for(tensors)
    report = load(write_checkpoint(tmp_path, tensors, shards=shards), params)
    want = whole_parameters(CONFIG, hf_tensors(CONFIG))
    assert set(params) == set(want)
    for name in want:
        assert torch.equal(params[name], want[name]), name
    assert report.num_tensors == len(tensors)
    assert report.bytes_read == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("one_each", [False, True])
def test_pieces_smaller_than_a_matrix_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_each: bool
) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 200)
    tensors = full_names(one_each=one_each)
    params = params_for(tensors)
    load(write_checkpoint(tmp_path, tensors), params)
    for name, want in whole_parameters(CONFIG, hf_tensors(CONFIG)).items():
        assert torch.equal(params[name], want), name


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_converted_to_the_dtype_of_the_parameters(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in full_names().items()}
    params = params_for(tensors, dtype=wanted)
    load(write_checkpoint(tmp_path, tensors), params)
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name, want in whole_parameters(CONFIG, short).items():
        assert torch.equal(params[name], want.to(wanted)), name


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("one_each", [False, True])
def test_each_of_eight_ranks_reads_only_its_share(tmp_path: Path, ep: int, one_each: bool) -> None:
    config = tiny_config(num_local_experts=4)
    fused = hf_tensors(config)
    tensors = prefixed(split_experts(fused) if one_each else fused, wrapped=False)
    folder = write_checkpoint(tmp_path, tensors, shards=2)
    whole = whole_parameters(config, fused)
    gate, up = whole["layers.1.moe.experts.gate_up"].split(24, dim=2)
    down = whole["layers.1.moe.experts.down"]
    ways = 8 // ep

    def one(ranks: Ranks) -> None:
        params = empty_parameters(config, as_stored(tensors), rank=ranks.rank, world=8, ep=ep)
        report = load_weights(params, folder, config, progress=False, ranks=ranks, ep=ep)
        assert report.bytes_read == sum(p.nbytes for p in params.values())
        group, part, width = ranks.rank // ways, ranks.rank % ways, 24 // ways
        own = slice(group * len(gate) // ep, (group + 1) * len(gate) // ep)
        mine = slice(width * part, width * (part + 1))
        experts = torch.cat([gate[own, :, mine], up[own, :, mine]], dim=2)
        assert torch.equal(params["layers.1.moe.experts.gate_up"], experts)
        assert torch.equal(params["layers.1.moe.experts.down"], down[own, mine])

    run_ranks(8, one)


def test_parameters_may_be_views_with_any_strides(tmp_path: Path) -> None:
    tensors = full_names()
    params = params_for(tensors)
    for name in [n for n, p in params.items() if p.dim() == 2]:
        params[name] = params[name].T.contiguous().T
    load(write_checkpoint(tmp_path, tensors), params)
    for name, want in whole_parameters(CONFIG, hf_tensors(CONFIG)).items():
        assert torch.equal(params[name], want), name


def test_shards_with_unaligned_tensors_are_read(tmp_path: Path) -> None:
    """The format asks for an aligned header only since 2022, and a header of odd length is still valid JSON."""
    tensors = full_names()
    folder = write_checkpoint(tmp_path, tensors)
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 3).to_bytes(8, "little") + raw[8 : 8 + length] + b"   " + raw[8 + length :])
    params = params_for(tensors)
    load(folder, params)
    assert torch.equal(params["embed.weight"], tensors["model.embed_tokens.weight"])


def test_vision_tensors_are_counted_and_skipped(tmp_path: Path) -> None:
    tensors = prefixed(hf_tensors(CONFIG), wrapped=True)
    params = params_for(tensors)
    tensors |= {
        "vision_model.class_embedding": torch.ones(3),
        "multi_modal_projector.linear_1.weight": torch.ones(2, 2),
    }
    report = load(write_checkpoint(tmp_path, tensors), params)
    assert report.num_vision == 2
    assert "2 vision tensors skipped (image input is not built yet)" in report.text()


def test_a_head_stored_beside_a_tied_embedding_is_skipped(tmp_path: Path) -> None:
    tied = tiny_config(tie_word_embeddings=True)
    tensors = prefixed(hf_tensors(tied), wrapped=False)
    params = empty_parameters(tied, as_stored(tensors))
    tensors["lm_head.weight"] = torch.zeros(56, 16)
    report = load_weights(params, write_checkpoint(tmp_path, tensors), tied, progress=False)
    assert "lm_head.weight" not in params
    assert report.num_tied == 1
    assert report.num_tensors == len(tensors) - 1


# --- what is wrong is named, and nothing is written ---


def refuse(folder: Path, match: str, error: type[Exception] = CheckpointError) -> None:
    params = params_for(full_names())
    with pytest.raises(error, match=match):
        load(folder, params)
    assert all(param.isnan().all() for param in params.values())


def test_missing(tmp_path: Path) -> None:
    tensors = full_names()
    del tensors[Q0]
    refuse(write_checkpoint(tmp_path, tensors), rf"{Q0} is missing; wanted \[32, 16\]")


def test_a_missing_name_is_spelled_as_in_this_checkpoint(tmp_path: Path) -> None:
    tensors = prefixed(hf_tensors(CONFIG), wrapped=True)
    del tensors["language_model.lm_head.weight"]
    refuse(write_checkpoint(tmp_path, tensors), r"language_model\.lm_head\.weight is missing")


def test_unknown(tmp_path: Path) -> None:
    tensors = full_names() | {"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}
    refuse(write_checkpoint(tmp_path, tensors), "self_attn.q_norm.weight is no weight of this model")


def test_experts_stored_both_ways_are_refused(tmp_path: Path) -> None:
    refuse(
        write_checkpoint(tmp_path, full_names() | full_names(one_each=True)),
        r"experts\.0\.down_proj\.weight is no weight",
    )


def test_one_missing_expert(tmp_path: Path) -> None:
    tensors = full_names(one_each=True)
    del tensors["model.layers.1.feed_forward.experts.2.up_proj.weight"]
    refuse(write_checkpoint(tmp_path, tensors), r"experts\.2\.up_proj\.weight is missing; wanted \[24, 16\]")


def test_misshaped(tmp_path: Path) -> None:
    tensors = full_names()
    name = "model.layers.1.feed_forward.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2)
    refuse(write_checkpoint(tmp_path, tensors), rf"{name} is \[3, 16, 24\]; wanted \[3, 24, 16\]")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_unsupported_dtype(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    tensors = full_names()
    tensors[Q0] = tensors[Q0].to(dtype)
    refuse(write_checkpoint(tmp_path, tensors), f"{Q0} is {name}; wanted BF16 or F16 or F32")


def test_the_same_weight_under_both_prefixes(tmp_path: Path) -> None:
    tensors = full_names() | {f"language_model.{Q0}": torch.zeros(32, 16)}
    refuse(write_checkpoint(tmp_path, tensors), rf"{Q0} and (language_model\.)?{Q0} are the same weight, stored twice")


def test_truncated_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, full_names())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refuse(folder, r"model\.safetensors: .* ends at byte \d+ and the file at \d+: it is truncated")


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, full_names(), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refuse(folder, r"shard model-00002-of-00003\.safetensors is named in .*index\.json and missing from the folder")


def test_duplicate_in_two_shards(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, full_names())
    save_file({Q0: torch.zeros(32, 16)}, folder / "more.safetensors")
    refuse(folder, rf"{Q0} is stored twice, in model\.safetensors and more\.safetensors")


def test_only_five_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    names = [name for name in full_names() if "layers.3" not in name]
    folder = write_checkpoint(tmp_path, {name: full_names()[name] for name in names})
    refuse(folder, r"(?s)is missing.*and 7 more\n  fix: l4 check ")


def test_pickled_weights_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    refuse(tmp_path, r"holds no \*\.safetensors, only pytorch_model\.bin: pickled weights can run code")


def test_folder_without_tensors(tmp_path: Path) -> None:
    refuse(tmp_path, r"holds no weights \(\*\.safetensors\)")


@pytest.mark.parametrize("where", ["config.json", "hf_quant_config.json"])
def test_a_scheme_without_quantised_weights(tmp_path: Path, where: str) -> None:
    config = CONFIG
    folder = write_checkpoint(tmp_path, full_names())
    if where == "config.json":
        config = tiny_config(quantization_config={"quant_method": "modelopt", "quant_algo": "FP8"})
    else:
        quant = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (folder / where).write_text(json.dumps(quant))
    with pytest.raises(CheckpointError, match="says ModelOpt FP8, but no tensor of the checkpoint has a scale"):
        load_weights(params_for(full_names()), folder, config, progress=False)


def test_unknown_quantisation_is_named(tmp_path: Path) -> None:
    config = tiny_config(quantization_config={"quant_method": "bitsandbytes", "bits": 4})
    with pytest.raises(NotBuiltError, match=r"quantised with bitsandbytes \(4\)"):
        load_weights({}, write_checkpoint(tmp_path, full_names()), config, progress=False)


# --- the model's side ---


def test_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, full_names())
    params = params_for(full_names())
    with pytest.raises(CheckpointError, match=r"parameter norm\.weight is known to the checkpoint layout only"):
        load(folder, {name: p for name, p in params.items() if name != "norm.weight"})
    with pytest.raises(CheckpointError, match="parameter extra is known to the model only"):
        load(folder, params | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"parameter norm\.weight is \[3\]; rank 0 wants \[16\]"):
        load(folder, params | {"norm.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=r"norm\.weight is torch\.float32 on meta; wanted real memory"):
        load(folder, params | {"norm.weight": torch.zeros(16, device="meta")})


def test_parameters_that_require_grad_are_filled(tmp_path: Path) -> None:
    tensors = full_names()
    params = {name: torch.nn.Parameter(p) for name, p in params_for(tensors).items()}
    load_weights(params, write_checkpoint(tmp_path, tensors), CONFIG, progress=False)
    assert torch.equal(params["norm.weight"].detach(), tensors["model.norm.weight"])


def test_progress_bar_counts_bytes_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = full_names()
    folder = write_checkpoint(tmp_path, tensors)
    load_weights(params_for(tensors), folder, CONFIG, progress=True)
    out, err = capsys.readouterr()
    assert "loading weights: 100%" in err
    assert out == ""
    load_weights(params_for(tensors), folder, CONFIG, progress=False)
    assert capsys.readouterr().err == ""


# --- dummy weights ---


def dummy(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    params = params_for(full_names(), dtype=dtype)
    fill_dummy(params, seed)
    return params


def test_dummy_weights_follow_from_seed_and_name() -> None:
    first, again, other = dummy(7), dummy(7), dummy(8)
    for name in first:
        assert torch.equal(first[name], again[name])
        norm = name.endswith("norm.weight")
        assert bool((first[name] == 1).all()) == norm
        assert torch.equal(first[name], other[name]) == norm
    assert not torch.equal(first["layers.0.attn.qkv.weight"], first["layers.1.attn.qkv.weight"])
    everything = torch.cat([p.flatten() for name, p in first.items() if "norm" not in name])
    assert abs(everything.std().item() - 0.02) < 0.001
    assert abs(everything.mean().item()) < 0.001


def test_dummy_weights_are_the_same_in_every_dtype_whatever_was_drawn_before() -> None:
    whole, half = dummy(7), dummy(7, torch.bfloat16)
    for name in whole:
        assert torch.equal(whole[name].bfloat16(), half[name])
    torch.manual_seed(3)
    assert torch.equal(dummy(7)["embed.weight"], whole["embed.weight"])


def test_dummy_needs_no_order_of_parameters() -> None:
    params = params_for(full_names())
    fill_dummy(dict(reversed(params.items())), 7)
    assert all(torch.equal(params[name], want) for name, want in dummy(7).items())


def test_dummy_weights_repeat_beyond_their_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing 100 billion numbers takes minutes. The period is a prime: rows repeat shifted."""
    monkeypatch.setattr(weights, "DUMMY_PERIOD", 97)
    params = {"a": torch.empty(3, 20, 10), "b": torch.empty(9, 10)}
    fill_dummy(params, 7)
    flat = params["a"].flatten()
    assert torch.equal(flat[:-97], flat[97:])
    assert len(flat[:97].unique()) == 97
    assert len(params["b"].unique()) == 90


@pytest.mark.gpu
@pytest.mark.parametrize("one_each", [False, True])
@pytest.mark.parametrize("piece", [200, weights.PIECE_BYTES])
def test_pinned_memory_brings_the_same_to_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_each: bool, piece: int
) -> None:
    """Each buffer is used again many times while copies out of it are under way."""
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    tensors = full_names(one_each=one_each)
    params = {name: param.to("cuda") for name, param in params_for(tensors, dtype=torch.bfloat16).items()}
    load(write_checkpoint(tmp_path, tensors), params)
    for name, want in whole_parameters(CONFIG, hf_tensors(CONFIG)).items():
        assert torch.equal(params[name].cpu(), want.bfloat16()), name
