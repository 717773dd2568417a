"""`l4 bench latency` and `throughput`: an engine in this process, on a tiny checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from l4core.bench.datasets import Lengths, Sample, random_tokens
from l4core.bench.steps import Bench
from l4core.cli.errors import run
from l4core.cli.main import l4
from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.speculation.drafter import PluginSpeculation
from l4core.errors import ConfigError
from l4core.model.moe import MoE
from l4core.ops.packed import can_pack
from l4core.testing.recorded_drafter import RecordedDrafter


@pytest.fixture(scope="module")
def made(tiny: Path) -> Bench:
    config = EngineConfig(
        model=tiny.as_posix(), dtype="float32", device="cpu", context_length=256, max_running_requests=4
    )
    return Bench(config, progress=False)


def test_a_decode_step_of_the_whole_batch_is_timed_beside_what_it_reads(made: Bench) -> None:
    row = made.decode(3, 40, 5)
    assert row["tokens_per_s"] == pytest.approx(3 / row["ms"] * 1e3)
    assert 1 <= row["experts"] <= 3
    assert row["floor_ms"] == pytest.approx(row["bytes"] / made.rates.copy * 1e3)
    weights = made.weights
    assert row["bytes"] > weights.rest + weights.head + weights.routed / made.config.num_experts
    assert not made._engine.has_work, "the next measurement would share its steps with this one"


def test_the_bytes_are_those_on_the_device(made: Bench) -> None:
    weights = made.weights
    total = sum(p.numel() * p.itemsize for p in made._engine.runner.model.parameters())
    assert weights.rest + weights.head + weights.table + weights.routed == pytest.approx(total, rel=0.05)
    assert weights.routed == made.config.num_layers * made.config.num_experts * 3 * 4 * (
        made.config.hidden_size * made.config.intermediate_size
    )


def test_a_prefill_computes_its_prompts_anew_each_time(made: Bench) -> None:
    row = made.prefill(2, 100, 2)
    assert row["tokens_per_s"] == pytest.approx(200 / row["ms"] * 1e3)
    assert row["floor_ms"] > 0


def test_each_part_of_a_layer_has_its_row_and_its_floor(made: Bench) -> None:
    rows = made.kernels([1, 3], 100)
    names = ["qkv", "o", "experts", "head", "global attention at 100", "local attention at 100"]
    assert [row["name"] for row in rows] == names * 2
    by_name = {row["name"]: row for row in rows[6:]}
    config = made.config
    keys = 2 * config.num_kv_heads * config.head_dim * 4
    queries = 2 * config.num_q_heads * config.head_dim * 4
    assert by_name["global attention at 100"]["bytes"] == 3 * (100 * keys + queries)
    assert by_name["local attention at 100"]["bytes"] == 3 * (100 % config.attention_chunk_size * keys + queries)
    heads = config.num_q_heads + 2 * config.num_kv_heads
    assert by_name["qkv"]["flops"] == 2 * 3 * config.hidden_size * heads * config.head_dim
    assert all(row["us"] > 0 and row["floor_us"] > 0 for row in rows)


def test_the_parts_of_a_model_whose_weights_were_packed(make_tiny: Callable[..., Path]) -> None:
    """On a CPU they are where they are large enough, and the plain ones are gone; the same bytes are read."""
    folder = make_tiny(layers=4, hidden=256, inter=1024, experts=3, heads=4, head_dim=64)
    config = EngineConfig(
        model=folder.as_posix(), dtype="float32", device="cpu", expert_kernel="torch", context_length=256
    )
    packed = Bench(config, progress=False)
    moe = next(module for module in packed._engine.runner.model.modules() if isinstance(module, MoE))
    assert (moe.packed is not None) is can_pack(torch.empty(256, 1024)), "the case that is meant, where this CPU has it"
    assert moe.routed_bytes == 3 * 3 * 256 * 1024 * 4
    row = next(row for row in packed.kernels([1], 100) if row["name"] == "experts")
    shared_and_router, activations = 3 * 256 * 1024 * 4 + 3 * 256 * 4, 2 * 256 * 4
    assert row["bytes"] == pytest.approx(moe.routed_bytes / 3 + shared_and_router + activations)


def test_throughput_counts_every_token(made: Bench) -> None:
    samples = random_tokens(9, Lengths(input=20, output=6, spread=0.5), range(200), 0)
    found = made.throughput(samples)
    assert (found["requests"], found["failed"]) == (9, 0)
    assert found["output_tokens"] == sum(sample.max_tokens for sample in samples)
    assert found["prefilled_tokens"] == found["input_tokens"] == sum(len(sample.prompt) for sample in samples)


def test_tokens_that_guesses_bring_are_counted(tiny: Path) -> None:
    """A drafter that is always right: four tokens of each request a step."""
    config = EngineConfig(
        model=tiny.as_posix(),
        dtype="float32",
        device="cpu",
        context_length=256,
        max_running_requests=4,
        speculative_algorithm="NGRAM",
        speculative_adaptive="off",
    )
    answers = dict[tuple[int, ...], list[int]]()
    recorder, bench = (Bench(config, progress=False) for _ in range(2))
    requests = recorder._requests(2, 20, 100)  # of the same seed, as the other makes them
    inbox, names = Inbox(requests=requests), {r.request_id: tuple(r.prompt_token_ids) for r in requests}
    while recorder._engine.has_work or inbox.requests:
        for update in recorder._step(inbox).updates:
            answers.setdefault(names[update.request_id], []).extend(update.new_token_ids)
        inbox = Inbox()
    size = bench.config.vocab_size
    drafter = RecordedDrafter(
        lambda row: answers[tuple(row.prompt_token_ids)], lambda row: 1.0, num_draft_tokens=3, vocab_size=size
    )
    bench._engine.speculation = PluginSpeculation("recorded", drafter, num_drafts=3, vocab_size=size)
    row = bench.decode(2, 20, 5)
    assert row["tokens_per_s"] == pytest.approx(2 * 4 / row["ms"] * 1e3)


def test_throughput_counts_no_prompt_that_was_refused(made: Bench) -> None:
    found = made.throughput([Sample(prompt=[1] * 250, max_tokens=50)])
    assert (found["failed"], found["total_tokens_per_s"]) == (1, 0.0)


def test_several_ranks_are_refused_with_what_measures_them(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="l4 bench predict --ranks 2"):
        Bench(EngineConfig(model=tiny.as_posix(), device="cpu", tp=2), progress=False)


def test_what_does_not_fit_is_a_sentence(made: Bench) -> None:
    with pytest.raises(ConfigError, match="4 requests at once"):
        made.decode(5, 10, 2)
    with pytest.raises(ConfigError, match="context holds"):
        made.prefill(1, 4000, 1)
    with pytest.raises(ConfigError, match="tokenizer"):
        made.throughput([Sample(prompt="text", max_tokens=1)])


def test_latency_on_the_command_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    arguments = ["bench", "latency", tiny.as_posix(), "--device", "cpu", "--dtype", "float32", "--batch", "1,2"]
    more = ["--input-len", "20", "--output-len", "3", "--prefill", "2x30", "--out", str(out), "--plot", str(tmp_path)]
    assert run(l4, [*arguments, *more], program="l4") == 0
    printed = capsys.readouterr().out
    assert "decode bs 2 at 20" in printed
    assert "copy rate" in printed
    found = json.loads(out.read_text())
    assert [row["name"] for row in found["rows"]] == ["decode bs 1 at 20", "decode bs 2 at 20", "prefill 2x30"]
    assert (tmp_path / "decode.svg").read_text().startswith("<svg")


def test_throughput_on_the_command_line(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "throughput", tiny.as_posix(), "--device", "cpu", "--num-prompts", "3", "--input-len", "8"]
    assert run(l4, [*arguments, "--output-len", "2", "--json"], program="l4") == 0
    assert json.loads(capsys.readouterr().out)["output_tokens"] == 6
    assert run(l4, ["bench", "latncy"], program="l4") == 2
    assert "latency" in capsys.readouterr().err
