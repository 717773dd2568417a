"""The commands, run on a tiny random checkpoint."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from helpers.commands import RunL4

TINY = ("--device", "cpu", "--dtype", "float32", "--max-total-tokens", "1024", "--log-level", "warning")


def test_generate(run_l4: RunL4, tiny: Path) -> None:
    ended = run_l4("generate", str(tiny), "abc", "de", "--max-tokens", "3", "--temperature", "0", "--json", *TINY)
    assert ended.code == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["abc", "de"]
    assert all(line["completion_tokens"] <= 3 for line in lines)


def test_generate_prints_text_and_takes_the_model_as_a_flag(run_l4: RunL4, tiny: Path) -> None:
    argv = ("abc", "--max-tokens", "3", "--temperature", "0", *TINY)
    by_flag = run_l4("generate", "--model", str(tiny), *argv)
    assert by_flag.code == 0, by_flag.err
    assert by_flag.out == run_l4("generate", str(tiny), *argv).out


def test_generate_without_a_prompt(run_l4: RunL4, tiny: Path) -> None:
    ended = run_l4("generate", str(tiny))
    assert ended.code == 2
    assert "no prompt is given" in ended.err


def test_generate_refuses_a_bad_request(run_l4: RunL4, tiny: Path) -> None:
    ended = run_l4("generate", str(tiny), "abc", "--temperature", "-1", *TINY)
    assert ended.code == 1
    assert "temperature is -1" in ended.err


@pytest.fixture(scope="session")
def not_numbers(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a last norm of NaN: every request fails when it draws."""
    folder = tmp_path_factory.mktemp("not-numbers")
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_generate_tells_that_a_prompt_failed(run_l4: RunL4, not_numbers: Path) -> None:
    ended = run_l4("generate", str(not_numbers), "abc", "de", "--max-tokens", "3", "--json", *TINY)
    assert ended.code == 1
    assert "2 of 2 prompts failed" in ended.err
    assert all("NaN" in json.loads(line)["error"] for line in ended.out.splitlines())


def test_chat_tells_that_an_answer_failed(run_l4: RunL4, not_numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("hi\n"))
    ended = run_l4("chat", str(not_numbers), "--max-tokens", "4", *TINY)
    assert "error: the model's logits" in ended.err


def test_chat_in_this_process(run_l4: RunL4, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("hi\nagain\n"))
    ended = run_l4("chat", str(tiny), "--max-tokens", "4", "--temperature", "0", *TINY)
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") >= 2
    assert "attention" in ended.err


def test_check(run_l4: RunL4, tiny: Path, tmp_path: Path) -> None:
    ended = run_l4("check", str(tiny))
    assert ended.code == 0, ended.out + ended.err
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    broken = run_l4("check", str(tmp_path))
    assert broken.code == 1
    assert "embed" in broken.out


def test_check_as_json(run_l4: RunL4, tiny: Path) -> None:
    ended = run_l4("check", str(tiny), "--json")
    found = json.loads(ended.out)
    assert ended.code == 0
    assert (found["ok"], found["folder"], found["problems"]) == (True, str(tiny), [])


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("chat_template.jinja", "{% for", "chat_template.jinja is not Jinja"),
        ("generation_config.json", '{"temperature": -1}', "temperature is -1"),
    ],
)
def test_check_finds_what_would_keep_the_server_from_starting(
    run_l4: RunL4, tiny: Path, tmp_path: Path, file: str, content: str, told: str
) -> None:
    for source in tiny.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    (tmp_path / file).write_text(content, encoding="utf-8")
    ended = run_l4("check", str(tmp_path))
    assert ended.code == 1
    assert told in ended.out
    assert "not servable, 1 problem(s)" in ended.out


def test_backends_here(run_l4: RunL4) -> None:
    found = json.loads(run_l4("backends", "--platform", "cpu", "--json").out)
    assert found["chosen"] == "sdpa"
    assert {row["name"] for row in found["candidates"]} >= {"sdpa", "reference"}


def test_backends_of_a_model(run_l4: RunL4, tiny: Path) -> None:
    found = json.loads(run_l4("backends", str(tiny), "--platform", "sm90", "--json").out)
    model = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    assert found["platform"]["arch"] == "sm90"
    assert found["requirements"]["num_q_heads"] == model["num_attention_heads"]
    assert found["requirements"]["chunk_size"] == model["attention_chunk_size"]


def test_backends_of_experts(run_l4: RunL4, tiny: Path) -> None:
    libraries = ("--with", "triton==3.6.0", "--with", "aiter==0.1.20")
    found = json.loads(run_l4("backends", str(tiny), "--platform", "gfx942", *libraries, "--experts", "--json").out)
    assert found["chosen"] == "triton"
    assert found["requirements"]["num_experts"] == 4
    text = run_l4("backends", "--platform", "cpu", "--experts").out
    assert "✓ torch " in text
    assert "✗ triton " in text


def test_backends_text_names_each(run_l4: RunL4) -> None:
    text = run_l4("backends").out
    assert "sdpa" in text
    assert "reference" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--with", "flashinfer==0.7.2"), "describe another machine"),
        (("--installed",), "describe another machine"),
        (("--platform", "sm90", "--installed", "--with", "x"), "exclude each other"),
        (("--platform", "sm9000"), "unknown platform"),
    ],
)
def test_backends_usage(run_l4: RunL4, argv: tuple[str, ...], message: str) -> None:
    ended = run_l4("backends", *argv)
    assert ended.code == 2
    assert message in ended.err


def test_plugins(run_l4: RunL4) -> None:
    assert "attention backend sdpa" in run_l4("plugins").out
    rows = json.loads(run_l4("plugins", "--json").out)
    own = next(row for row in rows if row["name"] == "l4core")
    assert own["status"] == "loaded"


def test_plugins_shows_what_is_left_out(run_l4: RunL4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L4_DISABLE_PLUGINS", "l4core")
    assert "named in L4_DISABLE_PLUGINS" in run_l4("plugins").out


def test_env_shows_versions_and_no_values(run_l4: RunL4, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("L4_API_KEY", "very-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for argv in (("env",), ("env", "--json")):
        ended = run_l4(*argv)
        assert ended.code == 0
        assert "L4_API_KEY" in ended.out
        assert "HF_TOKEN" in ended.out
        assert "secret" not in ended.out
    report = json.loads(ended.out)
    assert set(report["packages"]) >= {"torch", "transformers", "triton"}
    assert report["plugins"][0]["name"]


def test_demo_model_without_the_delta(run_l4: RunL4, tmp_path: Path) -> None:
    ended = run_l4("demo-model", str(tmp_path / "out"), "--delta", str(tmp_path))
    assert ended.code == 1
    assert "fix: clone the repository and pass --delta" in ended.err


def test_demo_model_does_not_overwrite(run_l4: RunL4, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(b"x")
    ended = run_l4("demo-model", str(tmp_path), "--base", str(base))
    assert ended.code == 1
    assert "already exists" in ended.err


def test_serve_on_a_taken_port(run_l4: RunL4, tiny: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ended = run_l4("serve", str(tiny), "--port", str(taken.getsockname()[1]), *TINY)
    assert ended.code == 2
    assert "error: " in ended.err
    assert "Traceback" not in ended.err
