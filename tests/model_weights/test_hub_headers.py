"""`l4 check HUB_ID` against a hub on loopback: it fetches headers, no tensors. Each case runs in its own process (see test_repository)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, FakeHub, serve
from tiny_folder import hf_tensors, prefixed, tiny_config, write_checkpoint

from l4core.model.hub_headers import FIRST_BYTES
from l4core.testing.models.tokenizers import make_byte_tokenizer

MODEL = "meta-llama/Llama-4-Tiny"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A whole checkpoint of two shards, each longer than what is fetched at once."""
    folder = tmp_path / "made"
    config = tiny_config(vocab_size=16_000)
    write_checkpoint(folder, prefixed(hf_tensors(config), wrapped=False), shards=2)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "vocab_size": 16_000}))
    make_byte_tokenizer(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with serve(FakeHub(repos={MODEL: files})) as running:
        yield running


def check(hub: FakeHub, home: Path, *arguments: str, **environ: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the report, stderr) of `l4 check MODEL --json`."""
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_") and "PROXY" not in k.upper()}
    env = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", **environ}
    program = "from l4core.cli import main; main()"
    command = [sys.executable, "-c", program, "check", MODEL, "--json", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def weights(files: dict[str, bytes]) -> dict[str, int]:
    return {name: len(data) for name, data in files.items() if name.endswith(".safetensors")}


def test_headers_tell_all_and_no_tensor_is_fetched(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    code, report, _ = check(hub, tmp_path / "home")
    assert (code, report["ok"], report["folder"]) == (0, True, MODEL), report
    assert report["file_bytes"] == sum(weights(files).values())
    for name, size in weights(files).items():
        assert hub.sent[name] <= min(FIRST_BYTES, size)
    assert sum(hub.sent[name] for name in weights(files)) < sum(weights(files).values())
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_one_shard_without_an_index(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", prefixed(hf_tensors(tiny_config(vocab_size=16_000)), wrapped=False))
    for name in [*weights(files), "model.safetensors.index.json"]:
        del files[name]
    files["model.safetensors"] = (one / "model.safetensors").read_bytes()
    code, report, _ = check(hub, tmp_path / "home")
    assert (code, report["ok"], report["shards"]) == (0, True, 1), report
    assert hub.sent["model.safetensors"] == FIRST_BYTES


def test_a_wrong_tensor_is_named_under_the_models_name(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    raw = json.loads(files["config.json"])
    files["config.json"] = json.dumps({**raw, "vocab_size": 16_001}).encode()
    code, report, _ = check(hub, tmp_path / "home")
    assert code == 1
    assert any("embed_tokens" in problem["text"] for problem in report["problems"])


def test_what_is_missing_or_truncated_on_the_hub(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    first, second = sorted(weights(files))
    del files[first]
    files[second] = files[second][:-4]
    code, report, _ = check(hub, tmp_path / "home")
    assert code == 1
    told = [problem["text"] for problem in report["problems"] if problem["kind"] == "shard"]
    assert any(first in text and "missing" in text for text in told)
    assert any(second in text and "truncated" in text for text in told)


def test_a_hub_that_sends_no_parts_is_not_made_to_send_all(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges = False
    code, _, err = check(hub, tmp_path / "home")
    assert code == 1
    assert "sends whole files only" in err


def test_offline_the_cache_must_have_all(hub: FakeHub, tmp_path: Path) -> None:
    code, _, err = check(hub, tmp_path / "home", HF_HUB_OFFLINE="1")
    assert code == 1
    assert "HF_HUB_OFFLINE forbids" in err


def test_cached_shards_are_read_from_the_cache(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    folder = tmp_path / "home" / "hub" / f"models--{MODEL.replace('/', '--')}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in weights(files):
        (folder / name).write_bytes(files[name])
    code, report, _ = check(hub, tmp_path / "home")
    assert (code, report["ok"]) == (0, True), report
    assert not weights(files).keys() & hub.sent.keys()
