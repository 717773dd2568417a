"""`l4 plan` as its user types it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from l4core.cli.main import l4
from l4core.errors import CheckpointError, ConfigError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(l4, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_table_that_a_person_reads() -> None:
    text = run("--model", "scout", "--gpu", "H100-80GB", "--tp", "8")
    assert "scout on 8 × H100-80GB" in text
    assert "3 global or 1 local pages" in text
    assert "waste 0.0% in global use" in text
    assert "--kv-cache-dtype fp8" in text
    assert "of fa3" in text
    assert "--tp 16" not in text  # 16 devices cannot share 40 query heads
    assert "as here: one pool for both" in text


def test_the_json_has_the_largest_context() -> None:
    found = json.loads(run("--model", "maverick", "--gpu", "H200", "--tp", "8", "--quantization", "fp8", "--json"))
    assert found["max_context"] == 1_048_576
    assert found["superpage"] == {"global": 3, "local": 1}
    parts = [found[f"{name}_bytes"] for name in ("weight", "workspace", "kv", "step", "table", "graph", "runtime")]
    assert sum(parts) == found["memory_bytes"]
    assert found["attention_backend"] == "fa3"


def test_fp8_kv_is_the_devices_own_format() -> None:
    """MI300X has another e4m3 than H200, and its backend takes that one."""
    for gpu, backend in (("MI300X", "aiter"), ("H200", "fa3")):
        assert f"of {backend}" in run("--model", "scout", "--gpu", gpu, "--tp", "8", "--kv-cache-dtype", "fp8")


def test_the_model_stands_where_other_commands_have_it() -> None:
    flags = ["--gpu", "H200", "--tp", "8", "--json"]
    assert run("scout", *flags) == run("--model", "scout", *flags)


def test_a_folder_and_any_memory(tiny: Path) -> None:
    found = json.loads(run("--model", str(tiny), "--memory", "8", "--page-size", "16", "--json"))
    assert found["tp"] == 1
    assert found["max_context"] > 0
    assert found["attention_backend"] == ""


def test_the_fraction_it_prints_gives_the_same_again() -> None:
    arguments = ["--model", "scout", "--gpu", "H100-80GB", "--tp", "8", "--json"]
    free = json.loads(run(*arguments))
    again = json.loads(run(*arguments, "--mem-fraction-static", str(free["mem_fraction_static"] - 0.0001)))
    assert again["max_context"] == pytest.approx(free["max_context"], rel=0.001)


def test_what_flags_cost() -> None:
    arguments = ["--model", "scout", "--gpu", "H100-80GB", "--tp", "8", "--length", "3000", "--json"]
    plain = json.loads(run(*arguments))
    assert list(plain["requests_at_once"]) == ["3000"]
    small = json.loads(run(*arguments, "--chunked-prefill-size", "2048"))
    assert small["step_bytes"] < plain["step_bytes"]
    assert small["kv_bytes"] > plain["kv_bytes"]
    with pytest.raises(ConfigError, match="is '5k'; wanted a number of tokens, or auto"):
        run(*arguments, "--context-length", "5k")
    assert json.loads(run(*arguments, "--context-length", "auto")) == plain


SCOUT = ("--model", "scout", "--gpu", "H200", "--quantization", "int4", "--json")
DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "draft_vocab_size": 32000,
}
SPECULATORS = {
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 32000,
    "transformer_layer_config": {key: value for key, value in DRAFT.items() if key != "architectures"},
}


def with_draft(folder: Path, config: dict[str, object], *flags: str) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(config))
    found: dict[str, Any] = json.loads(run(*SCOUT, "--draft", str(folder), *flags))
    return found


def test_a_draft_takes_weights_and_lies_beside_the_global_layers(tmp_path: Path) -> None:
    found = with_draft(tmp_path, DRAFT)
    assert found["draft_bytes"] == pytest.approx(1.53e9 + 3 * 5120 * 5120 * 2, rel=0.01)  # and fc
    assert found["waste"]["local"] == pytest.approx(1 - 36 / 39)
    assert found["token_bytes"]["global"] == 13 * 2 * 8 * 128 * 2


def test_a_draft_is_counted_with_the_flags_it_is_served_with(tmp_path: Path) -> None:
    """Layers that it reads are rows of its first matrix; guesses are rows of a step, and steps that are captured."""
    usual = with_draft(tmp_path, DRAFT)
    two = with_draft(tmp_path, DRAFT, "--speculative-option", "aux_layers=1,23")
    assert usual["draft_bytes"] - two["draft_bytes"] == 5120 * 5120 * 2
    five = with_draft(tmp_path, DRAFT, "--speculative-num-steps", "5")
    assert five["step_bytes"] > usual["step_bytes"]
    assert five["graph_bytes"] > usual["graph_bytes"] > json.loads(run(*SCOUT))["graph_bytes"]
    chain = with_draft(tmp_path, DRAFT, "--speculative-num-draft-tokens", "6")
    assert chain == five
    tree = with_draft(tmp_path, DRAFT, "--speculative-eagle-topk", "4")
    assert tree["step_bytes"] > five["step_bytes"]


def test_a_draft_that_does_not_say_all_is_told_by_an_option(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="fix: --speculative-option norm_before_residual=true"):
        with_draft(tmp_path, SPECULATORS)
    found = with_draft(tmp_path, SPECULATORS, "--speculative-option", "norm_before_residual=true")
    assert found == with_draft(tmp_path, DRAFT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft", "HERE", "--speculative-option", "aux=1"], "'aux' is unknown to EAGLE3; its options: aux_layers"),
        (["--draft", "HERE", "--speculative-num-steps", "3", "--speculative-num-draft-tokens", "9"], "verifies steps"),
        (["--draft", "HERE/nothing"], "nothing'; wanted a folder with the config.json of an EAGLE3 draft"),
        (["--speculative-option", "aux_layers=1"], "given without a draft"),
    ],
)
def test_wrong_flags_of_a_draft_are_errors(tmp_path: Path, flags: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DRAFT))
    with pytest.raises(ConfigError, match=message):
        run(*SCOUT, *(flag.replace("HERE", str(tmp_path)) for flag in flags))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "scout"], "one of the two"),
        (["--model", "scout", "--gpu", "H200", "--memory", "80"], "one of the two"),
        (["--model", "scout", "--gpu", "H300"], "known are L4-24GB"),
        (["--model", "nothing-here", "--gpu", "H200"], "wanted a folder"),
        (["--gpu", "H200"], "no model is given"),
        (["scout", "--model", "maverick", "--gpu", "H200"], "given twice: 'scout' and 'maverick'"),
    ],
)
def test_wrong_flags_are_errors_with_the_way_out(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(l4, ["plan", *arguments], catch_exceptions=False, standalone_mode=False)


def test_the_chart_of_the_docs(tmp_path: Path) -> None:
    """Two kinds of KV, plain and hybrid, and what the device has: hybrid lines end further right."""
    out = tmp_path / "chart.svg"
    run("--model", "scout", "--gpu", "H100-80GB", "--tp", "8", "--plot", str(out))
    lines = re.findall(r'<polyline points="([^"]+)"', out.read_text())
    ends = [tuple(map(float, line.split()[-1].split(","))) for line in lines]
    assert len(lines) == 5
    plain, hybrid = ends[0], ends[1]
    assert hybrid[0] > plain[0] + 50  # four times the tokens on a logarithmic axis
    assert hybrid[1] == pytest.approx(plain[1], abs=3)  # in the same memory
    title = re.search("scout on 8 × H100-80GB[^<]*", out.read_text())
    assert title is not None
    assert title[0] in (Path(__file__).parents[2] / "docs/memory-scout.svg").read_text()
