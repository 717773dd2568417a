"""The four third-party packages of examples/, installed as a user installs them, found by their entry points, and used over HTTP together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from helpers.packages import pip_install
from helpers.serving import serve

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = ("l4-block-attention", "l4-bigram-drafter", "l4-xtc-sampler", "l4-chatml-template")
QUESTION = [{"role": "user", "content": "Which way?"}]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process that has the four packages (and the l4core under test) on its path."""
    target = tmp_path_factory.mktemp("site")
    pip_install(target, *(EXAMPLES / package for package in PACKAGES))
    return {"PYTHONPATH": target.as_posix()}


@pytest.fixture(scope="module")
def chatml_tiny(make_tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose tokenizer knows ChatML's two special tokens."""
    from l4core.testing.models.checkpoints import make_tiny_checkpoint
    from l4core.testing.models.tokenizers import make_byte_tokenizer

    root = tmp_path_factory.mktemp("chatml")
    make_byte_tokenizer(root / "tokenizer", extra_specials=("<|im_start|>", "<|im_end|>"))
    return make_tiny_checkpoint(root / "model", tokenizer=root / "tokenizer")


@pytest.fixture(scope="module")
def url(installed: dict[str, str], chatml_tiny: Path) -> Iterator[str]:
    flags = ["--served-model-name", "tiny", "--dtype", "float32", "--device", "cpu", "--port", "0"]
    chosen = ["--attention-backend", "block", "--chat-template", "chatml", "--speculative-algorithm", "bigram"]
    with serve([chatml_tiny.as_posix(), *flags, *chosen], env=installed) as (address, served):
        assert "block (l4-block-attention" in served.output
        assert "bigram (l4-bigram-drafter" in served.output
        yield address


def chat(url: str, **body: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, **body}, timeout=300)


def test_backend_and_drafter_give_the_tokens_of_the_built_in_backend_without_drafts(
    url: str, chatml_tiny: Path, installed: dict[str, str]
) -> None:
    reply = chat(url, temperature=0, max_tokens=80).json()
    mine = reply["choices"][0]["message"]["content"]
    assert sum(reply["usage"]["completion_tokens_details"].values()) > 0, "guesses were verified"
    flags = [
        "--served-model-name",
        "tiny",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--port",
        "0",
        "--chat-template",
        "chatml",
    ]
    with serve([chatml_tiny.as_posix(), *flags], env=installed) as (other, served):
        assert "block (" not in served.output
        theirs = chat(other, temperature=0, max_tokens=80).json()["choices"][0]["message"]["content"]
    assert mine == theirs


def test_the_template_is_chatml(url: str) -> None:
    """The prompt's ids spell ChatML: tokens of `<|im_start|>user\\n…<|im_end|>\\n<|im_start|>assistant\\n`."""
    spelled = "<|im_start|>user\nWhich way?<|im_end|>\n<|im_start|>assistant\n"
    ids = httpx.post(f"{url}/tokenize", json={"model": "tiny", "prompt": spelled, "add_special_tokens": False}).json()[
        "tokens"
    ]
    assert chat(url, max_tokens=1).json()["usage"]["prompt_tokens"] == len(ids)


def test_the_sampler_is_used_and_checked(url: str) -> None:
    plain = {"temperature": 1.0, "seed": 5, "max_tokens": 40}
    xtc = {**plain, "sampler": "xtc", "sampler_args": {"threshold": 0.02, "probability": 1.0}}
    texts = [chat(url, **body).json()["choices"][0]["message"]["content"] for body in (plain, xtc, xtc)]
    assert texts[0] != texts[1]
    assert texts[1] == texts[2]
    refused = chat(url, sampler="xtc", sampler_args={"threshold": 7})
    assert refused.status_code == 400
    assert "threshold" in refused.json()["error"]["message"]


def test_plugins_lists_all_four(installed: dict[str, str]) -> None:
    import os

    out = subprocess.run(
        [Path(sys.executable).with_name("l4").as_posix(), "plugins"],
        env={**os.environ, **installed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for package in PACKAGES:
        assert package in out
