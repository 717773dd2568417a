"""The four commands of SGLang's Llama 4 guide, verbatim but for the module's name, on tiny checkpoints that stand in a local hub cache under the
real names. Eight ranks: eight processes."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import httpx
import pytest

from helpers.ports import free_port, is_free
from helpers.serving import serve
from l4core.testing.models.eagle3 import make_tiny_draft

SCOUT, MAVERICK = "meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"
LAUNCH = (sys.executable, "-m", "l4core.launch_server")
DRAFT = "nvidia/Llama-4-Maverick-17B-128E-Eagle3"
REVISION = "0" * 40
DEFAULT_PORT = 30000

LONG_SCOUT = f"--model-path {SCOUT} --tp 8 --context-length 1000000"
EAGLE3 = f"""--model-path {MAVERICK} --speculative-algorithm EAGLE3
    --speculative-draft-model-path {DRAFT} --speculative-num-steps 3
    --speculative-eagle-topk 1 --speculative-num-draft-tokens 4 --trust-remote-code --tp 8 --context-length 1000000"""
EVAL_SCOUT = f"--model-path {SCOUT} --port 30000 --tp 8 --mem-fraction-static 0.8 --context-length 65536"
EVAL_MAVERICK = f"--model-path {MAVERICK} --port 30000 --tp 8 --mem-fraction-static 0.8 --context-length 65536"


def put_in_cache(cache: Path, repo_id: str, folder: Path, **config: object) -> None:
    """A hub cache holds snapshots by revision, and a ref that says which one is `main`."""
    repo = cache / "hub" / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / REVISION
    shutil.copytree(folder, snapshot)
    raw = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps({**raw, **config}))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)


@pytest.fixture(scope="module")
def hub_env(make_tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("hf_home")
    put_in_cache(home, SCOUT, make_tiny(), max_position_embeddings=10_485_760)
    put_in_cache(home, MAVERICK, make_tiny(step=2, qk_norm=False), max_position_embeddings=1_048_576)
    maverick = json.loads((make_tiny(step=2, qk_norm=False) / "config.json").read_text())
    draft = make_tiny_draft(tmp_path_factory.mktemp("draft"), maverick, aux_layers=[1, 3, 5])
    put_in_cache(home, DRAFT, draft)
    return {"HF_HOME": home.as_posix(), "HF_HUB_OFFLINE": "1"}


def answers(url: str, model: str) -> bool:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
    return reply.status_code == 200 and bool(reply.json()["choices"][0]["message"])


def at_a_free_port(flags: str) -> tuple[int, list[str]]:
    """(port, arguments): as they are; where somebody's server has the default port, at another one."""
    if is_free(DEFAULT_PORT):
        return DEFAULT_PORT, shlex.split(flags)
    port = free_port()
    return port, [*shlex.split(flags.replace(f"--port {DEFAULT_PORT}", "")), "--port", str(port)]


@pytest.mark.parametrize(
    ("flags", "model", "context"),
    [(LONG_SCOUT, SCOUT, 1_000_000), (EVAL_SCOUT, SCOUT, 65_536), (EVAL_MAVERICK, MAVERICK, 65_536)],
    ids=["scout 1M", "scout lm_eval", "maverick lm_eval"],
)
def test_the_guides_serving_commands_serve(hub_env: dict[str, str], flags: str, model: str, context: int) -> None:
    """Port 30000 is the default; the address printed is the one the guide's lm_eval line asks."""
    port, arguments = at_a_free_port(flags)
    with serve(arguments, command=LAUNCH, env=hub_env) as (url, served):
        assert url.endswith(f":{port}")
        assert f"{context:,} tokens" in served.output
        assert "8 compute the model together" in served.output
        assert answers(url, model)


def test_the_guides_eagle3_command_serves(hub_env: dict[str, str]) -> None:
    """The draft comes from the hub too; its layers are reported as they are read."""
    with serve(at_a_free_port(EAGLE3)[1], command=LAUNCH, env=hub_env) as (url, served):
        assert "EAGLE3 · 3 guesses a step" in served.output
        assert "reads outputs of layers 1, 3, 5" in served.output
        assert answers(url, MAVERICK)
