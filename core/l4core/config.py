"""Every option, named once. `l4 serve`, `launch_server`, YAML files, `LLM(**)` and docs/options.md are generated from this one table.

A field's own name is its option (`context_length` → `--context-length`); aliases are SGLang's and vLLM's spellings. Config is parsed once,
frozen, and never patched: derived values live elsewhere (kv.planner, model.config).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from l4core.errors import ConfigError
from l4core.option import LATER, Option, check, option_of, options

T = TypeVar("T")


def _opt(default: T, help: str, group: str, **kw: Any) -> T:
    made: T = field(default=default, metadata={"option": Option(help=help, group=group, **kw)})
    return made


MODEL, ATTENTION, MEMORY, SCHEDULING, SPECULATION, PARALLEL, SAMPLING, SERVER = (
    "Model",
    "Attention",
    "Memory",
    "Scheduling",
    "Speculative decoding",
    "Parallelism",
    "Sampling",
    "Server",
)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine needs to know. Raises ConfigError for a value out of range and NotBuiltError for what does not exist yet."""

    model: str = _opt("", "checkpoint folder or hub id", MODEL, aliases=("model_path",), metavar="DIR|ID")
    revision: str | None = _opt(None, "branch, tag or commit of a hub id", MODEL)
    download_dir: str | None = _opt(None, "where hub files are kept (default: HF_HOME)", MODEL, metavar="DIR")
    served_model_name: str | None = _opt(None, "name clients use (default: the model as given)", MODEL)
    dtype: str = _opt(
        "auto",
        "compute dtype; auto = the checkpoint's (float32 where a CPU has no bfloat16)",
        MODEL,
        choices=("auto", "float32", "bfloat16", "float16", "float64"),
    )
    device: str = _opt("auto", "torch device; auto = an accelerator if there is one", MODEL, metavar="DEVICE")
    load_format: str = _opt(
        "auto",
        "auto = safetensors; dummy = seeded random weights, no files but config.json",
        MODEL,
        choices=("auto", "safetensors", "dummy"),
    )
    quantization: str | None = _opt(
        None,
        "quantise plain weights while loading: fp8 all matrices of the layers, int4 the experts (default: as the checkpoint is)",
        MODEL,
        choices=("fp8", "int4"),
    )
    trust_remote_code: bool = _opt(False, "accepted for compatibility; code from a checkpoint is never executed", MODEL)
    enable_multimodal: bool = _opt(False, "image input", MODEL, not_built=f"--enable-multimodal {LATER} (text works)")
    context_length: int | None = _opt(
        None,
        "largest prompt + answer (default, and auto: the checkpoint's, or what memory holds if less)",
        MODEL,
        aliases=("max_model_len",),
        unit="tokens",
        minimum=1,
        auto=True,
    )
    attention_backend: str | None = _opt(
        None,
        "backend by name (default: the best usable one; `l4 backends` lists them with reasons)",
        ATTENTION,
        metavar="NAME",
    )
    attention_option: tuple[str, ...] = _opt(
        (), "key=value for the chosen backend; may be repeated", ATTENTION, metavar="KEY=VALUE"
    )
    expert_kernel: str | None = _opt(
        None,
        "kernel of the mixture of experts by name (default: the best usable)",
        MODEL,
        aliases=("moe_runner_backend",),
        metavar="NAME",
    )
    page_size: int | None = _opt(
        None,
        "tokens of a KV page; any divisor of the model's attention chunk (default: the backend's preference, 64)",
        ATTENTION,
        aliases=("block_size",),
        unit="tokens",
        minimum=1,
    )
    kv_cache_dtype: str = _opt(
        "auto",
        "KV dtype; auto = the compute dtype; fp8 = fp8_e4m3, with the checkpoint's scales where it has some",
        MEMORY,
        choices=("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2"),
    )
    mem_fraction_static: float | None = _opt(
        None,
        "weights + KV at most this share of device memory (default: what a step and the runtime leave; printed at start)",
        MEMORY,
        aliases=("gpu_memory_utilization",),
        minimum=0.01,
        maximum=1.0,
    )
    max_total_tokens: int | None = _opt(None, "cap on KV tokens of the global layers", MEMORY, unit="tokens", minimum=1)
    swa_full_tokens_ratio: float | None = _opt(
        None,
        "cap on local KV as a share of global KV, by SGLang's arithmetic (default: none, all memory serves both)",
        MEMORY,
        above=0.0,
        maximum=1.0,
    )
    disable_hybrid_swa_memory: bool = _opt(
        False, "keep the local KV of finished chunks until a request ends, for comparison", MEMORY
    )
    disable_radix_cache: bool = _opt(False, "no prefix cache: every prompt is computed whole", MEMORY)
    disable_cuda_graph: bool = _opt(
        False,
        "launch every kernel from the host: no graphs of decode steps",
        SCHEDULING,
        aliases=("enforce_eager",),
    )
    cuda_graph_max_bs: int | None = _opt(
        None,
        "largest batch of decodes that gets a graph (default: max-running-requests, at most 512)",
        SCHEDULING,
        aliases=("max_cudagraph_capture_size",),
        unit="sequences",
        minimum=1,
    )
    disable_overlap_schedule: bool = _opt(
        False,
        "wait for a step's tokens before the next step is scheduled; on an accelerator the host otherwise works a step ahead",
        SCHEDULING,
    )
    max_running_requests: int = _opt(256, "sequences in one step", SCHEDULING, aliases=("max_num_seqs",), minimum=1)
    chunked_prefill_size: int = _opt(
        8192,
        "tokens computed in one step, decodes first",
        SCHEDULING,
        aliases=("max_num_batched_tokens",),
        unit="tokens",
        minimum=1,
    )
    itl_target_ms: float | None = _opt(
        None,
        "wanted time between two tokens of a request, at most: while requests decode, a step computes no more of the prompts than keeps it",
        SCHEDULING,
        unit="milliseconds",
        minimum=0.1,
    )
    tp: int = _opt(
        1,
        "ranks that compute one model together, one device each",
        PARALLEL,
        aliases=("tp_size", "tensor_parallel_size"),
        unit="ranks",
        minimum=1,
    )
    ep: int = _opt(
        1,
        "groups of ranks that the experts are dealt out to; tp must divide by it (default: each rank has a part of every expert)",
        PARALLEL,
        aliases=("ep_size", "expert_parallel_size"),
        unit="groups",
        minimum=1,
    )
    dist_timeout: float = _opt(
        30.0,
        "a rank without a sign of life for so long counts as lost, a step of ten times that as hung; all ranks then end and start again",
        PARALLEL,
        unit="seconds",
        minimum=0.5,
        maximum=86_400,
    )
    speculative_algorithm: str | None = _opt(
        None,
        "guess tokens and verify them, which changes no token: EAGLE3, NGRAM, or the name of an installed drafter (default: off)",
        SPECULATION,
        metavar="NAME",
        later=("EAGLE", "NEXTN", "STANDALONE"),
    )
    speculative_draft_model_path: str | None = _opt(
        None, "EAGLE3 draft: folder or hub id", SPECULATION, aliases=("speculative_draft_model",), metavar="DIR|ID"
    )
    speculative_num_steps: int | None = _opt(
        None,
        "how many tokens ahead to guess (default: 3)",
        SPECULATION,
        aliases=("num_speculative_tokens",),
        unit="tokens",
        minimum=1,
        maximum=63,
    )
    speculative_eagle_topk: int | None = _opt(
        None,
        "EAGLE3: how many tokens follow a guess, and how many guesses of a step are followed; 1 = a chain, more = a tree (default: 1)",
        SPECULATION,
        minimum=1,
        maximum=32,
    )
    speculative_num_draft_tokens: int | None = _opt(
        None,
        "tokens verified per sequence and step, the last committed one among them (a chain's: steps + 1; a tree's: 2 · topk · steps + 1, at most 64)",
        SPECULATION,
        unit="tokens",
        minimum=2,
        maximum=64,
    )
    speculative_adaptive: str = _opt(
        "on",
        "on = as many guesses as pay off by measured times and acceptance, none where plain steps are faster; off = always all",
        SPECULATION,
        choices=("on", "off"),
    )
    speculative_option: tuple[str, ...] = _opt(
        (), "key=value for the chosen drafter; may be repeated", SPECULATION, metavar="KEY=VALUE"
    )
    random_seed: int = _opt(0, "seeds requests without a seed, and dummy weights", SAMPLING, aliases=("seed",))
    sampler: str = _opt("default", "sampler of requests that name none", SAMPLING, metavar="NAME")
    sampling_defaults: str = _opt(
        "model",
        "defaults of requests: the checkpoint's generation_config.json, or OpenAI's (temperature 1)",
        SAMPLING,
        choices=("model", "openai"),
    )
    chat_template: str | None = _opt(
        None, "entry name (llama-4) or .jinja file (default: the checkpoint's own)", SAMPLING, metavar="NAME|FILE"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.swa_full_tokens_ratio is not None and self.disable_hybrid_swa_memory:
            raise ConfigError(
                "--swa-full-tokens-ratio caps local KV, and --disable-hybrid-swa-memory keeps all of it",
                fix="give one of the two",
            )
        if self.tp % self.ep:
            raise ConfigError(f"--tp {self.tp} does not divide by --ep {self.ep}", fix=f"--tp {self.ep} or a multiple")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """What the HTTP server needs to know beside the engine."""

    host: str = _opt("127.0.0.1", "address to listen on; loopback unless you say otherwise", SERVER)
    port: int = _opt(30000, "port; 0 = any free one", SERVER, minimum=0, maximum=65535)
    api_key: str | None = _opt(
        None, "required as `Authorization: Bearer KEY` on every route but health and ready (env: L4_API_KEY)", SERVER
    )
    log_level: str = _opt("info", "how much to log", SERVER, choices=("debug", "info", "warning", "error"))
    max_queued_requests: int = _opt(1024, "sequences waiting or running before 429 + Retry-After", SERVER, minimum=1)
    max_body_bytes: int | None = _opt(
        None,
        "largest request body before 413 (default: 8 MiB, or 16 bytes a token of the context if that is more)",
        SERVER,
        unit="bytes",
        minimum=1024,
    )
    drain_seconds: float = _opt(
        30.0, "after SIGTERM, time for running requests to finish", SERVER, unit="seconds", minimum=0, maximum=86_400
    )
    watchdog_timeout: float = _opt(
        600.0,
        "longest step before the engine process counts as hung and is started again; 0 = wait for ever",
        SERVER,
        unit="seconds",
        minimum=0,
        maximum=86_400,
    )

    dp: int = _opt(
        1,
        "engines on this machine behind one address, each with --tp devices of its own; the least loaded gets the next request "
        "(on a CPU each takes half of what memory is free: --max-total-tokens)",
        PARALLEL,
        aliases=("dp_size", "data_parallel_size"),
        unit="engines",
        minimum=1,
    )
    nnodes: int = _opt(1, "machines that the ranks are spread over", PARALLEL, unit="machines", minimum=1)
    node_rank: int = _opt(
        0, "which of the machines this is; 0 serves HTTP, the others compute with it", PARALLEL, minimum=0
    )
    dist_init_addr: str | None = _opt(
        None,
        "where machine 0 waits for the others: an address of it, and a free port",
        PARALLEL,
        aliases=("nccl_init_addr",),
        metavar="HOST:PORT",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"--node-rank is {self.node_rank}; wanted 0 … {self.nnodes - 1} (--nnodes {self.nnodes})")
        if self.nnodes > 1 and self.dist_init_addr is None:
            raise ConfigError(
                f"--nnodes {self.nnodes} without --dist-init-addr",
                fix="--dist-init-addr HOST:PORT, the same on all machines",
            )
        if self.nnodes == 1 and self.dist_init_addr is not None:
            raise ConfigError(
                f"--dist-init-addr {self.dist_init_addr} is for several machines, and --nnodes is 1",
                fix="--nnodes N, or leave --dist-init-addr out: ranks of one machine find each other by themselves",
            )
        if self.dp > 1 and self.nnodes > 1:
            raise ConfigError(
                f"--dp {self.dp} is of one machine, and --nnodes is {self.nnodes}",
                fix="one server for each engine, behind any HTTP router",
            )


def field_of(name: str) -> tuple[type[Any], str]:
    """Config class and field that `name` (a field or an alias, with - or _) stands for. ConfigError names the nearest one otherwise."""
    wanted = name.replace("-", "_")
    known: dict[str, tuple[type[Any], str]] = {}
    for cls in (EngineConfig, ServerConfig):
        for own, _, option in options(cls):
            for spelling in (own, *option.aliases):
                known[spelling] = (cls, own)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=1)
    raise ConfigError(
        f"unknown option {name!r}", fix=f"did you mean {near[0]!r}?" if near else "l4 serve --help lists all options"
    )


def from_mapping(values: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """Both configs from one flat mapping of names or aliases (YAML, keyword arguments). Naming one option twice is an error."""
    split: dict[type[Any], dict[str, Any]] = {EngineConfig: {}, ServerConfig: {}}
    for name, value in values.items():
        cls, own = field_of(name)
        if own in split[cls]:
            raise ConfigError(f"option {own!r} is given twice (once as {name!r})", fix="keep one of the spellings")
        split[cls][own] = None if value == "auto" and option_of(cls, own).auto else _frozen(value)
    return EngineConfig(**split[EngineConfig]), ServerConfig(**split[ServerConfig])


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
