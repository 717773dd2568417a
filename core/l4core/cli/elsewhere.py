"""Flags of SGLang and vLLM that L4 does not have, and what to do about each here. An error for one says it; docs/options.md lists them."""

from __future__ import annotations

from collections.abc import Mapping

TOOLS = "leave it out: tool calls are not built yet"
STRUCTURED = "leave it out: structured output is not built yet"
IMAGES = "leave it out: images are not built yet"
ORDER = "leave it out: requests are served by their priority field, then as they came"
COMPILED = "leave it out: there is nothing to compile; --disable-cuda-graph turns graphs off"
PIPELINE = "--tp N, and --dp N for more engines"

ELSEWHERE: Mapping[str, str] = {
    "enable_metrics": "leave it out: /metrics is always there (docs/metrics.md)",
    "enable_cache_report": "leave it out: usage always has cached_tokens",
    "enable_mixed_chunk": "leave it out: prompts and decodes always share steps",
    "enable_chunked_prefill": "leave it out: it is always on; --chunked-prefill-size N",
    "max_prefill_tokens": "--chunked-prefill-size N: tokens of a step; --itl-target-ms N: as many as a latency allows",
    "enable_prefix_caching": "leave it out: it is on unless --disable-radix-cache",
    "no_enable_prefix_caching": "--disable-radix-cache",
    "hybrid_kvcache_ratio": "leave it out: one pool serves both kinds of layers; --swa-full-tokens-ratio R caps the local ones",
    "enable_hybrid_kvcache": "leave it out: it is on unless --disable-hybrid-swa-memory",
    "schedule_policy": ORDER,
    "scheduling_policy": ORDER,
    "schedule_conservativeness": "leave it out: a request that finds no page left waits, or is computed again later",
    "enable_torch_compile": COMPILED,
    "compilation_config": COMPILED,
    "disable_cuda_graph_padding": "leave it out: every batch of up to 8 has a graph of its own",
    "tool_call_parser": TOOLS,
    "enable_auto_tool_choice": TOOLS,
    "reasoning_parser": "leave it out: Llama 4 has no reasoning format",
    "grammar_backend": STRUCTURED,
    "guided_decoding_backend": STRUCTURED,
    "limit_mm_per_prompt": IMAGES,
    "tokenizer": "leave it out: the tokenizer is the one in the model's folder",
    "tokenizer_path": "leave it out: the tokenizer is the one in the model's folder",
    "enable_expert_parallel": "--ep N: groups of ranks that whole experts are dealt out to",
    "pp_size": PIPELINE,
    "pipeline_parallel_size": PIPELINE,
    "log_requests": "leave it out: requests are not logged; /metrics counts them",
    "disable_log_requests": "leave it out: requests are not logged",
    "stream_interval": "leave it out: a streamed answer has an event for every step",
    "decode_log_interval": "leave it out: /metrics has what is logged there",
}
"""Name, with underscores → the fix."""


def fix_for(flag: str) -> str:
    """Of a flag as it was typed; "" for one that is not known there either."""
    return ELSEWHERE.get(flag.lstrip("-").replace("-", "_"), "")
