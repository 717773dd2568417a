"""MODEL as a folder and as a hub id, against a hub on loopback. Each hub case runs in its own process: huggingface_hub reads its
environment once, at import, and that is the behaviour users get."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, OLDER, FakeHub, serve

from l4core.config import EngineConfig
from l4core.errors import CheckpointError, ConfigError
from l4core.model.repository import resolve_model

SCOUT, GATED = "meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Gated"
WANTED = {
    "config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
}  # fmt: skip
UNWANTED = {
    "pytorch_model.bin", "consolidated.00.pth", "modeling_llama4.py", "tokenizer.py", "model.gguf", "README.md", "weights.pt",
    "original/params.json", "original/consolidated.safetensors", ".gitattributes",
}  # fmt: skip
FILES = {name: name.encode() for name in WANTED | UNWANTED}

ASK = """
import json, sys
from l4core.config import EngineConfig
from l4core.errors import L4Error
from l4core.model.repository import resolve_model
answers = []
for options in json.loads(sys.argv[1]):
    try:
        answers.append({"folder": str(resolve_model(EngineConfig(**options)))})
    except L4Error as error:
        answers.append({"error": type(error).__name__, "text": str(error)})
print(json.dumps(answers))
"""


def ask(url: str, home: Path, *cases: dict[str, Any], **environ: str) -> list[dict[str, str]]:
    """Resolves each case in a fresh process whose hub is `url` and whose HF_HOME is `home`."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.upper().startswith("HF_") and "PROXY" not in key.upper()
    }
    env = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1", **environ}
    command = [sys.executable, "-c", ASK, json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    answers: list[dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve(FakeHub(repos={SCOUT: FILES, GATED: FILES}, gated=frozenset({GATED}))) as running:
        yield running


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(EngineConfig(model=str(tmp_path))) == tmp_path


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "scout").mkdir()
    assert resolve_model(EngineConfig(model="~/scout")) == tmp_path / "scout"


def test_a_folder_named_like_a_hub_id_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SCOUT).mkdir(parents=True)
    assert resolve_model(EngineConfig(model=SCOUT)) == Path(SCOUT)


@pytest.mark.parametrize(
    "model", ["", "scout", "./models/scout", "../scout", "/models/scout", "~/scout", "a/b/c", "owner/", "a b/c"]
)
def test_neither_a_folder_nor_a_hub_id(model: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"^MODEL {re.escape(repr(model))} is no folder on this machine, and no hub id"
    ):
        resolve_model(EngineConfig(model=model))


def test_a_file_is_refused_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=f"is a file; wanted the folder .*\n  fix: give its folder: {tmp_path}"):
        resolve_model(EngineConfig(model=str(tmp_path / "model.gguf")))


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--revision v1 names a revision of a hub id"):
        resolve_model(EngineConfig(model=str(tmp_path), revision="v1"))


def test_download_then_offline(hub: FakeHub, tmp_path: Path) -> None:
    """The first start fetches what serving needs and nothing else; with HF_HUB_OFFLINE the next one finds it."""
    home, elsewhere = tmp_path / "home", str(tmp_path / "elsewhere")
    missing = {"model": SCOUT, "revision": "nope"}
    online = ask(
        hub.url, home, {"model": SCOUT, "load_format": "dummy"}, {"model": SCOUT}, missing, {"model": "meta-llama/none"}
    )
    folder = Path(online[1]["folder"])
    assert online[0]["folder"] == online[1]["folder"]
    assert folder.is_relative_to(home)
    assert folder.name == COMMIT
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == WANTED
    assert hub.fetched() == WANTED
    assert all((folder / name).read_bytes() == FILES[name] for name in WANTED)
    assert online[2] == {
        "error": "CheckpointError",
        "text": f"the hub has {SCOUT}, but not its revision 'nope'\n"
        "  fix: leave --revision out for the newest, or give a branch, tag or commit of that model",
    }
    assert online[3]["text"].startswith(
        "the hub has no model meta-llama/none, or it is private and you are not logged in\n"
    )
    assert "hf auth login" in online[3]["text"]

    hub.asked.clear()
    cases = [{"model": SCOUT}, missing, {"model": GATED}, {"model": SCOUT, "download_dir": elsewhere}]
    offline = ask(hub.url, home, *cases, HF_HUB_OFFLINE="1")
    assert offline[0] == {"folder": str(folder)}
    assert offline[1]["text"].endswith(f"hf download {SCOUT} --revision nope")
    assert offline[2]["text"] == (
        f"{GATED} is not complete in the cache (HF_HOME), and HF_HUB_OFFLINE forbids to fetch it\n"
        f"  fix: unset HF_HUB_OFFLINE, or on a machine with a network: hf download {GATED}"
    )
    assert offline[3]["text"].endswith(f"hf download {SCOUT} --cache-dir {elsewhere}")
    assert hub.asked == []


def test_dummy_weights_need_no_weights(hub: FakeHub, tmp_path: Path) -> None:
    ask(hub.url, tmp_path, {"model": SCOUT, "load_format": "dummy"})
    assert hub.fetched() == {name for name in WANTED if not name.endswith(".safetensors")}


def test_revision_and_download_dir(hub: FakeHub, tmp_path: Path) -> None:
    where = tmp_path / "elsewhere"
    answers = ask(hub.url, tmp_path / "home", {"model": SCOUT, "revision": "v1", "download_dir": str(where)})
    folder = Path(answers[0]["folder"])
    assert folder.name == OLDER
    assert folder.is_relative_to(where)
    assert (folder / "tokenizer.json").read_bytes() == b"tokenizer.json"


def test_gated(hub: FakeHub, tmp_path: Path) -> None:
    for token in ({}, {"HF_TOKEN": "hf_wrong"}):
        (answer,) = ask(hub.url, tmp_path, {"model": GATED}, **token)
        unset = "" if token else " (HF_TOKEN is not set)"
        assert answer == {
            "error": "CheckpointError",
            "text": f"{GATED} is gated: its licence must be accepted by the account whose token is used{unset}\n"
            f"  fix: open the hub page of {GATED}, accept the licence, then: hf auth login (or set HF_TOKEN)",
        }
    (answer,) = ask(hub.url, tmp_path, {"model": GATED}, HF_TOKEN="hf_right")
    assert {path.name for path in Path(answer["folder"]).iterdir()} == WANTED


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_a_hub_that_refuses_files(hub: FakeHub, tmp_path: Path, method: str) -> None:
    """410, since the client repeats a 500 for half a minute before it gives up; 403 without a word is what a token of narrow rights gets."""
    hub.refused = {method: 410}
    (answer,) = ask(hub.url, tmp_path, {"model": SCOUT})
    assert answer["text"] == (
        f"{SCOUT} is not complete in the cache (HF_HOME), and the hub answered HTTP 410\n  fix: later: hf download {SCOUT}"
    )
    hub.refused = {method: 403}
    (answer,) = ask(hub.url, tmp_path, {"model": SCOUT})
    assert answer["text"].startswith(f"{SCOUT} is gated")


def test_a_hub_that_is_down(hub: FakeHub, tmp_path: Path) -> None:
    hub.down = 410
    (answer,) = ask(hub.url, tmp_path, {"model": SCOUT})
    assert "and the hub answered HTTP 410" in answer["text"]


def test_no_network(tmp_path: Path) -> None:
    """A cache laid out by hand (as copied from another machine) is served; what is not there names the network, but no address."""
    snapshot = tmp_path / "hub" / f"models--{SCOUT.replace('/', '--')}" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").touch()
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    url = "http://127.0.0.1:9"
    cached, absent = ask(url, tmp_path, {"model": SCOUT}, {"model": GATED})
    assert cached == {"folder": str(snapshot)}
    assert absent["text"] == (
        f"{GATED} is not complete in the cache (HF_HOME), and the hub cannot be reached (ConnectError)\n"
        f"  fix: check the network (and HF_ENDPOINT, if you set it), then: hf download {GATED}"
    )
