"""`l4 bench predict`: the arithmetic against what was worked out by hand for one rank of eight of Scout, and the command on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from l4core.bench.device import Rates
from l4core.bench.floor import weights_by_config
from l4core.bench.predict import CARDS, NVLINK, Link, Load, Measured, Rank, assumptions, predict, published
from l4core.bench.rank import cut
from l4core.cli.errors import run
from l4core.cli.main import l4
from l4core.engine.start.capacity import load_config
from l4core.errors import ConfigError
from l4core.model.slicing import rank_config

LOAD = Load(concurrency=64, input=1000, output=1000)
H200 = Rates(copy=CARDS["H200"].copy, matmul=CARDS["H200"].matmul, dtype="bfloat16")


def rank_of(model: str, layers: int = 48, weights: str = "bfloat16") -> Rank:
    config = rank_config(load_config(model), 8)
    config = cut(config, layers)
    return Rank(ranks=8, config=config, weights=weights_by_config(config, weights), kv_bytes=2, step_tokens=8192)


def at_the_floor(rank: Rank, load: Load = LOAD) -> Measured:
    """What a device of an H200's rates would take that wastes nothing."""
    decode = rank.decode_floor(load, load.middle, H200.copy)
    prefill = rank.prefill_floor(load, CARDS["H200"])
    experts = rank.config.num_experts * (1 - (1 - 1 / rank.config.num_experts) ** 64)
    layers = rank.config.num_layers
    return Measured(decode_ms=decode * 1e3, prefill_ms=prefill * 1e3, experts=experts, layers=layers, rates=H200)


def test_a_sum_over_ranks_sends_twice_the_bytes_of_the_others() -> None:
    link = Link(bandwidth=100e9, latency=10e-6)
    assert link.all_reduce(8e6, 8) == pytest.approx(10e-6 + 2 * 7e6 / 100e9)
    assert link.all_reduce(8e6, 1) == 0


def test_one_rank_of_eight_of_scout() -> None:
    """By hand, in GB: an expert of a rank 3 · 5120 · 1024 · 2 = 31.5 MB, 48 · (15.74 hit + 1 shared) of them 25.3; attention's matrices 48 · 15.7 MB;
    head 0.26; keys and values 64 · 1500 · 48 · 512 bytes."""
    rank = rank_of("scout")
    read = rank.decode_floor(LOAD, LOAD.middle, 1.0)
    expert, attention = 3 * 5120 * 1024 * 2, (5 + 2 + 5) * 128 * 5120 * 2
    hit = 16 * (1 - (15 / 16) ** 64)
    wanted = 48 * (expert * (hit + 1) + attention) + 5120 * 202048 / 8 * 2 + 64 * 1500 * 48 * 512
    assert read == pytest.approx(wanted, rel=1e-3)
    found = predict(at_the_floor(rank), rank, rank, LOAD, "H200", NVLINK)
    assert found.decode_ms == pytest.approx(wanted / 4.25e12 * 1e3, rel=1e-3)
    assert rank.all_reduces == 98
    assert found.sums_ms == pytest.approx(98 * (0.020 + 2 * 7 / 8 * 64 * 5120 * 2 / 370e9 * 1e3))
    round_s = found.prefill_ms / 1e3 + 999 * found.step_ms / 1e3
    assert found.tokens_per_s == pytest.approx(64_000 / round_s, rel=2e-3)
    assert found.floor_tokens_per_s > found.tokens_per_s


def test_without_link_costs_a_perfect_device_is_at_its_floor() -> None:
    rank = rank_of("maverick", weights="fp8")
    found = predict(at_the_floor(rank), rank, rank, LOAD, "H200", Link(bandwidth=1e30, latency=0))
    assert found.tokens_per_s == pytest.approx(found.floor_tokens_per_s)
    over_a_border = dataclasses.replace(LOAD, input=8000)  # local layers see few keys behind it, many before
    measured = at_the_floor(rank, over_a_border)
    found_there = predict(measured, rank, rank, over_a_border, "H200", Link(bandwidth=1e30, latency=0))
    assert found_there.tokens_per_s == pytest.approx(found_there.floor_tokens_per_s)
    slower = predict(at_the_floor(rank), rank, rank, LOAD, "H100-80GB", NVLINK)
    assert slower.decode_ms == pytest.approx(found.decode_ms * 4.25 / 3.03)


def test_experts_that_were_not_hit_are_added_and_layers_that_were_not_run() -> None:
    whole = rank_of("scout")
    full = predict(at_the_floor(whole), whole, whole, LOAD, "H200", NVLINK)
    part = rank_of("scout", layers=8)
    fewer = at_the_floor(part)
    hit = part.weights.read(4 / 16) - part.weights.read(fewer.experts / 16)
    lucky = dataclasses.replace(fewer, decode_ms=fewer.decode_ms + hit / H200.copy * 1e3, experts=4.0)
    found = predict(lucky, part, whole, LOAD, "H200", NVLINK)
    assert found.tokens_per_s == pytest.approx(full.tokens_per_s)
    assert found.decode_ms == pytest.approx(full.decode_ms)
    said = assumptions(lucky, whole, LOAD, NVLINK)
    assert any("8 of 48 layers" in line for line in said)
    assert any("hit 4.0 of 16 experts" in line for line in said)


def test_prompts_come_in_steps_each_of_which_waits_for_its_sums() -> None:
    rank = rank_of("scout")
    found = predict(at_the_floor(rank), rank, rank, LOAD, "H200", NVLINK)
    seven, last = rank.sums(NVLINK, 8192), rank.sums(NVLINK, 64_000 - 7 * 8192)
    assert found.prefill_sums_ms == pytest.approx((7 * seven + last) * 1e3)


def test_layers_are_cut_where_their_kinds_recur() -> None:
    assert cut(load_config("scout"), 8).num_layers == 8
    with pytest.raises(ConfigError, match="recur every 4"):
        cut(load_config("maverick"), 6)


def test_figures_of_others_are_for_just_what_they_ran() -> None:
    found = published("scout", "H100-80GB", 8, "bfloat16", LOAD)
    assert found is not None
    assert found.tokens_per_s == 2647
    assert "vLLM 0.8.3" in found.source
    assert published("scout", "H100-80GB", 4, "bfloat16", LOAD) is None
    assert published("maverick", "H200", 8, "bfloat16", LOAD) is None


def test_on_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    arguments = ["bench", "predict", tiny.as_posix(), "--device", "cpu", "--dtype", "float32", "--ranks", "2"]
    more = ["--layers", "4", "--concurrency", "3", "--input-len", "20", "--output-len", "6", "--out", str(out)]
    assert run(l4, [*arguments, *more], program="l4") == 0
    printed = capsys.readouterr().out
    assert "2 × H100-80GB" in printed
    assert "4 of 8 layers were run" in printed
    found = json.loads(out.read_text())
    assert [each["card"] for each in found["predictions"]] == ["H100-80GB", "H200"]
    assert all(each["tokens_per_s"] > 0 and each["published"] is None for each in found["predictions"])
    assert found["measured"]["decode_ms"] > 0


def test_an_unknown_card_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(l4, ["bench", "predict", tiny.as_posix(), "--gpu", "H300"], program="l4") == 2
    assert "H100-80GB" in capsys.readouterr().err
