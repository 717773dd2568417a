"""`python -m l4core.launch_server` takes what SGLang users type."""

from __future__ import annotations

import shlex

import pytest

from l4core.cli.serve import serve
from l4core.cli.settings import read_configs
from l4core.config import EngineConfig, ServerConfig
from l4core.errors import NotBuiltError

SCOUT, MAVERICK = "meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"

FLAGS = """
--model-path m --tp 8 --context-length 4096 --mem-fraction-static 0.8 --host 0.0.0.0 --port 30000 --attention-backend sdpa
--chat-template llama-4 --page-size 64 --chunked-prefill-size 8192 --max-running-requests 8 --max-total-tokens 100000
--kv-cache-dtype auto --dtype bfloat16 --device cpu --trust-remote-code --api-key k --served-model-name n --random-seed 3
--load-format dummy --disable-cuda-graph --disable-radix-cache --disable-hybrid-swa-memory --log-level warning
"""
VLLM_FLAGS = "--model m --max-model-len 4096 --gpu-memory-utilization 0.8 --max-num-seqs 8 --max-num-batched-tokens 8192 --enforce-eager"
NOT_BUILT = {
    "--enable-multimodal": "--enable-multimodal",
    "--speculative-algorithm STANDALONE": "--speculative-algorithm STANDALONE",
}


def parse(line: str) -> tuple[EngineConfig, ServerConfig]:
    with serve.make_context("launch_server", shlex.split(line)) as context:
        return read_configs(context)


def test_every_flag_of_the_list() -> None:
    engine, server = parse(FLAGS)
    assert (engine.model, engine.tp, engine.context_length, engine.mem_fraction_static) == ("m", 8, 4096, 0.8)
    assert (server.host, server.port, server.api_key, server.log_level) == ("0.0.0.0", 30000, "k", "warning")
    assert (engine.attention_backend, engine.chat_template, engine.page_size) == ("sdpa", "llama-4", 64)
    assert (engine.chunked_prefill_size, engine.max_running_requests, engine.max_total_tokens) == (8192, 8, 100000)
    assert (engine.kv_cache_dtype, engine.dtype, engine.device, engine.load_format) == (
        "auto",
        "bfloat16",
        "cpu",
        "dummy",
    )
    assert (engine.served_model_name, engine.random_seed) == ("n", 3)
    assert engine.trust_remote_code
    assert engine.disable_cuda_graph
    assert engine.disable_radix_cache


def test_vllm_spellings() -> None:
    engine, _ = parse(VLLM_FLAGS)
    assert (engine.context_length, engine.mem_fraction_static, engine.max_running_requests) == (4096, 0.8, 8)
    assert (engine.chunked_prefill_size, engine.disable_cuda_graph) == (8192, True)


def test_default_port() -> None:
    assert parse("--model-path m")[1].port == 30000


@pytest.mark.parametrize(("flag", "named"), NOT_BUILT.items())
def test_what_is_not_built_says_so(flag: str, named: str) -> None:
    with pytest.raises(NotBuiltError, match="not built yet") as caught:
        parse(f"--model-path m {flag}")
    assert caught.value.message.startswith(named)


@pytest.mark.parametrize(
    ("line", "model", "context"),
    [
        (f"--model-path {SCOUT} --tp 8 --context-length 1000000", SCOUT, 1000000),
        (f"--model-path {SCOUT} --port 30000 --tp 8 --mem-fraction-static 0.8 --context-length 65536", SCOUT, 65536),
        (
            f"--model-path {MAVERICK} --port 30000 --tp 8 --mem-fraction-static 0.8 --context-length 65536",
            MAVERICK,
            65536,
        ),
    ],
)
def test_the_guides_commands(line: str, model: str, context: int) -> None:
    engine, server = parse(line)
    assert (engine.model, engine.context_length, server.port) == (model, context, 30000)


def test_the_guides_eagle3_command() -> None:
    engine, _ = parse(
        f"--model-path {MAVERICK} --speculative-algorithm EAGLE3 --speculative-draft-model-path nvidia/Llama-4-Maverick-17B-128E-Eagle3 "
        "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4 --trust-remote-code --tp 8 "
        "--context-length 1000000"
    )
    assert (engine.speculative_algorithm, engine.speculative_num_steps) == ("EAGLE3", 3)
    assert (engine.speculative_eagle_topk, engine.speculative_num_draft_tokens) == (1, 4)
    assert engine.speculative_draft_model_path == "nvidia/Llama-4-Maverick-17B-128E-Eagle3"
