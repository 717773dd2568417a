"""Quantised checkpoints, and plain ones quantised while loading, through the engine on a CPU: the same as the plain model with the same numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from l4core import LLM, SamplingParams
from l4core.cli.main import l4
from l4core.errors import CheckpointError, ConfigError, NotBuiltError
from l4core.model.config import ModelConfig
from l4core.model.layout import parameters
from l4core.model.llama4 import Llama4
from l4core.model.quantised import exchange_layers
from l4core.model.weights import load_weights
from l4core.quant import fp8, int4
from l4core.quant.formats import format_of
from quant.quantised_folder import (
    CHANNEL_FP8,
    MODELOPT,
    PACKED_INT4,
    Pair,
    Tensors,
    channel_fp8,
    is_linear,
    make,
    modelopt_fp8,
    packed_int4,
    set_quantization,
    weights,
)

PROMPTS = [[5, 9, 200, 31], list(range(40, 120))]
FORMATS = {
    "compressed-tensors FP8": (channel_fp8, CHANNEL_FP8),
    "ModelOpt FP8": (modelopt_fp8, MODELOPT),
    "compressed-tensors INT4": (packed_int4, PACKED_INT4),
}


@pytest.fixture(scope="session")
def source(make_tiny: Callable[..., Path]) -> Path:
    """Dense and MoE layers, q and k with QK norm off in none; K = 256 everywhere in experts."""
    return make_tiny(layers=4, step=2, hidden=256, inter=256, inter_mlp=384, experts=3, vocab=300)


@pytest.fixture(scope="session")
def pairs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Pair]:
    root = tmp_path_factory.mktemp("quantised")
    return {name: make(source, root / name.replace(" ", "-"), *how) for name, how in FORMATS.items()}


def answers(folder: Path, **options: Any) -> tuple[list[list[int]], torch.Tensor]:
    """(tokens, the log-probability of each)."""
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 200, "progress": False} | options
    params = SamplingParams(max_tokens=4, temperature=0.0, logprobs=1, ignore_eos=True)
    with LLM(folder.as_posix(), **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS, params)]
    values = [[step[token] for token, step in zip(o.token_ids, o.logprobs or [], strict=True)] for o in outputs]
    return [list(o.token_ids) for o in outputs], torch.tensor(values)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_answers_as_the_plain_one_with_its_numbers(pairs: Mapping[str, Pair], name: str) -> None:
    tokens, logprobs = answers(pairs[name].stored)
    want_tokens, want = answers(pairs[name].plain)
    assert tokens == want_tokens
    torch.testing.assert_close(logprobs, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("quantization", "largest"), [("fp8", 0.04), ("int4", 0.11)])
def test_plain_weights_are_quantised_while_loading(
    source: Path, tmp_path: Path, quantization: str, largest: float
) -> None:
    """The engine's model against the plain folder that holds what the formats' definitions make of the weights."""
    tensors = load_file(source / "model.safetensors")
    plain = {name: requantised(name, weight, quantization) for name, weight in tensors.items()}
    changed = [name for name in tensors if not torch.equal(plain[name], tensors[name])]
    assert any("experts" in name for name in changed)
    assert any("self_attn" in name for name in changed) == (quantization == "fp8")
    assert not any("router" in name or "embed" in name or "lm_head" in name or "norm" in name for name in changed)
    for name in changed:
        assert (plain[name] - tensors[name]).norm() < largest * tensors[name].norm()
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(plain, folder / "model.safetensors")
    tokens, logprobs = answers(source, quantization=quantization)
    want_tokens, want = answers(folder)
    assert tokens == want_tokens
    torch.testing.assert_close(logprobs, want, atol=2e-5, rtol=0)


def requantised(name: str, weight: torch.Tensor, quantization: str) -> torch.Tensor:
    experts = ".experts." in name or "shared_expert." in name
    if not experts and not (quantization == "fp8" and is_linear(name)):
        return weight
    rows = weight.transpose(1, 2) if ".experts." in name else weight  # out by in
    if quantization == "fp8":
        made = fp8.dequantize(*fp8.quantize(rows))
    else:
        made = int4.dequantize(*int4.quantize(rows), rows.shape[-1])
    return (made.transpose(1, 2) if ".experts." in name else made).contiguous()


class Largest(TorchFunctionMode):
    """The largest tensor that torch.empty and its like make."""

    numel = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and func is not torch.Tensor.detach:
            self.numel = max(self.numel, made.numel())
        return made


@pytest.mark.parametrize("quantization", ["fp8", "int4"])
def test_no_more_than_one_matrix_is_plain_at_a_time(source: Path, quantization: str) -> None:
    config = ModelConfig.from_folder(source)
    names = (parameter.name for parameter in parameters(config, ()))
    formats = {name: kept for name in names if (kept := format_of(name, quantization)) != "plain"}
    with torch.device("meta"):
        model = exchange_layers(Llama4(config, max_positions=64), formats)
    params = dict(model.to_empty(device="cpu").named_parameters())
    plain = [param.numel() for name, param in params.items() if name not in formats]
    with Largest() as largest:
        load_weights(params, source, config, progress=False, formats=formats)
    dense, expert = 2 * 384 * 256, 2 * 256 * 256
    assert largest.numel <= max(dense if quantization == "fp8" else expert, *plain) < config.num_experts * expert


def test_only_layers_that_a_checkpoint_quantises_are_quantised(pairs: Mapping[str, Pair], tmp_path: Path) -> None:
    """Meta's files leave the shared expert plain; here layer 1 is plain as a whole and the shared expert of layer 3."""
    stored, plain = load_file(pairs["compressed-tensors FP8"].stored / "model.safetensors"), {}
    reference = load_file(pairs["compressed-tensors FP8"].plain / "model.safetensors")
    for name, tensor in stored.items():
        if "layers.1." not in name and "shared_expert" not in name:
            plain[name] = tensor
        elif not name.endswith("_scale"):
            plain[name] = reference[name]
    folder = copy_with(pairs["compressed-tensors FP8"].stored, tmp_path, plain)
    tokens, logprobs = answers(folder)
    want_tokens, want = answers(pairs["compressed-tensors FP8"].plain)
    assert tokens == want_tokens
    torch.testing.assert_close(logprobs, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_what_a_verify_costs_is_predicted_from_the_bytes_that_are_kept(source: Path, quantization: str | None) -> None:
    """Experts of four bits are not counted as if they were plain: they would be all that a step reads."""
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 200, "progress": False}
    with LLM(source.as_posix(), speculative_algorithm="NGRAM", quantization=quantization, **options) as llm:
        assert llm._built.drafts is not None
        costs = llm._built.drafts.costs
        sizes = {name: p.nbytes for name, p in llm._built.engine.runner.model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    if quantization:
        assert costs.expert * costs.num_experts == routed
    assert costs.fixed + costs.expert * costs.num_experts == sum(sizes.values()) - sizes["embed.weight"]


def copy_with(source: Path, out: Path, tensors: Tensors) -> Path:
    shutil.copytree(source, out / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "copy" / "model.safetensors")
    return out / "copy"


# --- refused by name ---


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"quantised with gptq \(4\)"),
        (weights(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True), r"4-bit int, group"),
        (weights(num_bits=4, type="int", strategy="group", group_size=128, symmetric=False), r"4-bit int, group"),
        (weights(num_bits=4, type="float", strategy="tensor_group", group_size=16), r"4-bit float, tensor_group"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"modelopt \(NVFP4\)"),
    ],
)
def test_an_unknown_scheme(source: Path, tmp_path: Path, config: dict[str, Any], match: str) -> None:
    folder = copy_with(source, tmp_path, load_file(source / "model.safetensors"))
    set_quantization(folder, config)
    with pytest.raises(NotBuiltError, match=match):
        answers(folder)


@pytest.mark.parametrize(
    ("content", "config", "match"),
    [
        ("compressed-tensors INT4", CHANNEL_FP8, r"gate_proj.weight_scale is \[256, 2\]; wanted \[256, 1\]"),
        ("compressed-tensors FP8", PACKED_INT4, "q_proj.weight is F8_E4M3; wanted BF16 or F16 or F32"),
        ("ModelOpt FP8", PACKED_INT4, "q_proj.weight is F8_E4M3; wanted BF16 or F16 or F32"),
    ],
)
def test_a_scheme_that_its_tensors_do_not_bear_out(
    pairs: Mapping[str, Pair], tmp_path: Path, content: str, config: dict[str, Any], match: str
) -> None:
    folder = copy_with(pairs[content].stored, tmp_path, load_file(pairs[content].stored / "model.safetensors"))
    set_quantization(folder, config)
    with pytest.raises(CheckpointError, match=match):
        answers(folder)


@pytest.mark.parametrize(("content", "asked"), [("compressed-tensors FP8", "int4"), ("compressed-tensors INT4", "fp8")])
def test_another_format_than_the_checkpoint_has(pairs: Mapping[str, Pair], content: str, asked: str) -> None:
    with pytest.raises(ConfigError, match=f"--quantization {asked} is asked for and .* holds {content} weights"):
        answers(pairs[content].stored, quantization=asked)


@pytest.mark.parametrize("name", FORMATS)
def test_l4_plan_counts_what_is_loaded(pairs: Mapping[str, Pair], name: str) -> None:
    folder = pairs[name].stored.as_posix()
    planned = CliRunner().invoke(l4, ["plan", "--model", folder, "--memory", "8", "--json"], catch_exceptions=False)
    with LLM(folder, dtype="bfloat16", device="cpu", max_model_len=200, progress=False) as llm:
        assert json.loads(planned.output)["weight_bytes"] == llm._built.budget.needs.weights


def test_a_packed_weight_without_its_scale(pairs: Mapping[str, Pair], tmp_path: Path) -> None:
    tensors = load_file(pairs["compressed-tensors INT4"].stored / "model.safetensors")
    name = "model.layers.1.feed_forward.experts.2.up_proj.weight_scale"
    del tensors[name]
    folder = copy_with(pairs["compressed-tensors INT4"].stored, tmp_path, tensors)
    with pytest.raises(CheckpointError, match=rf"{name} is missing; wanted \[256, 2\]"):
        answers(folder)
