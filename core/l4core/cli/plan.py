"""`l4 plan`: what a model holds on a device, before it is launched."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from l4core.cli.command import L4Command
from l4core.cli.table import text_table
from l4core.errors import ConfigError

if TYPE_CHECKING:
    from l4core.attention.select import Candidate
    from l4core.engine.speculation.plan import SpeculationPlan
    from l4core.engine.start.capacity import Capacity, Setup
    from l4core.model.config import ModelConfig
    from l4core.plugin_api import Usable

GIB = 1 << 30
LIBRARIES = ("triton==3.6.0", "flash_attn_interface==3.0.0", "flashinfer==0.7.2", "aiter==0.1.20")
"""Vendors' libraries that the device is taken to have."""
KV_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")


@click.command(cls=L4Command, short_help="What fits on a device: weights, KV, the largest context.")
@click.argument("model_argument", metavar="[MODEL]", required=False)
@click.option("--model", metavar="DIR|scout|maverick", help="a folder with config.json, or a released model")
@click.option("--gpu", metavar="NAME", help="H100-80GB, H200, B200, MI300X, … (an unknown name lists all)")
@click.option("--memory", type=click.FloatRange(min=0.1), metavar="GIB", help="memory of one device, instead of --gpu")
@click.option("--tp", type=click.IntRange(min=1), default=1, metavar="N", help="tensor-parallel devices [1]")
@click.option("--ep", type=click.IntRange(min=1), default=1, metavar="N", help="groups of them for the experts [1]")
@click.option(
    "--quantization",
    type=click.Choice(["none", "fp8", "int4"]),
    default="none",
    help="how weights are kept [none: bfloat16]",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(KV_DTYPES),
    metavar=f"[{'|'.join(KV_DTYPES)}]",
    default="auto",
    help="dtype of KV [auto: bfloat16]",
)
@click.option(
    "--draft",
    "--speculative-draft-model-path",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="an EAGLE3 draft's folder; its config.json is enough",
)
@click.option("--speculative-num-steps", type=click.IntRange(1, 63), metavar="N", help="tokens it guesses ahead [3]")
@click.option(
    "--speculative-eagle-topk", type=click.IntRange(1, 32), metavar="N", help="tokens that follow a guess [1: a chain]"
)
@click.option(
    "--speculative-num-draft-tokens",
    type=click.IntRange(2, 64),
    metavar="N",
    help="tokens verified, as `l4 serve` has it",
)
@click.option(
    "--speculative-option",
    multiple=True,
    metavar="KEY=VALUE",
    help="for the draft, as `l4 serve` has it; may be repeated",
)
@click.option("--page-size", type=click.IntRange(min=1), metavar="N", help="tokens of a KV page [the backend's: 64]")
@click.option("--context-length", metavar="N|auto", help="tokens that one request must be able to have [auto]")
@click.option(
    "--max-running-requests", type=click.IntRange(min=1), default=256, metavar="N", help="sequences in one step [256]"
)
@click.option(
    "--chunked-prefill-size",
    type=click.IntRange(min=1),
    default=8192,
    metavar="N",
    help="tokens computed in one step [8192]",
)
@click.option(
    "--mem-fraction-static",
    type=click.FloatRange(0.01, 1.0),
    metavar="F",
    help="weights + KV at most this share of the device [what a step and the runtime leave]",
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="count requests of so many tokens; may be repeated [a row of lengths]",
)
@click.option(
    "--swa-full-tokens-ratio",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="R",
    help="cap on local KV as a share of global KV, by SGLang's arithmetic [none]",
)
@click.option("--disable-hybrid-swa-memory", is_flag=True, help="keep local KV of finished chunks, for comparison")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="also draw memory against length, as SVG",
)
@click.option("--json", "as_json", is_flag=True, help="JSON instead of text")
def plan(
    model_argument: str | None,
    model: str | None,
    gpu: str | None,
    memory: float | None,
    tp: int,
    ep: int,
    quantization: str,
    kv_cache_dtype: str,
    draft: Path | None,
    speculative_num_steps: int | None,
    speculative_eagle_topk: int | None,
    speculative_num_draft_tokens: int | None,
    speculative_option: tuple[str, ...],
    page_size: int | None,
    context_length: str | None,
    max_running_requests: int,
    chunked_prefill_size: int,
    mem_fraction_static: float | None,
    swa_full_tokens_ratio: float | None,
    disable_hybrid_swa_memory: bool,
    length: tuple[int, ...],
    plot: Path | None,
    as_json: bool,
) -> None:
    """What MODEL (a folder with config.json, scout or maverick) holds on a device: weights, KV memory, the largest context, requests at once, and
    what each flag would change.

    The same arithmetic sizes the engine at start-up. Text half only: the vision encoder is not loaded yet.
    """
    from l4core.engine.start.capacity import LENGTHS, Setup, capacity, load_config

    model = one_model(model_argument, model)
    config = load_config(model)
    kv_bytes = 1 if kv_cache_dtype.startswith("fp8") else 2
    speculation = speculation_of(
        config,
        draft,
        tp=tp,
        num_steps=speculative_num_steps,
        eagle_topk=speculative_eagle_topk,
        num_draft_tokens=speculative_num_draft_tokens,
        options=speculative_option,
    )
    backend, verdict = backend_of(
        config, gpu, tp, kv_cache_dtype, page_size, max_running_requests, chunked_prefill_size, speculation
    )
    setup = Setup(
        memory_bytes=memory_of(gpu, memory),
        tp=tp,
        ep=ep,
        formats=formats_of(model, config, None if quantization == "none" else quantization),
        weights="bfloat16" if quantization == "none" else quantization,
        kv_bytes=kv_bytes,
        page_size=page_size or (verdict.preferred_page_size if verdict else 64),
        context_length=tokens_of(context_length),
        max_running=max_running_requests,
        num_tokens=chunked_prefill_size,
        fraction=mem_fraction_static,
        local_ratio=swa_full_tokens_ratio,
        hybrid=not disable_hybrid_swa_memory,
        workspace=verdict.workspace_bytes if verdict else 0,
        graphs=captured(max_running_requests, speculation) if verdict and verdict.graph else (),
        speculation=speculation,
        lengths=length or LENGTHS,
    )
    found = capacity(config, setup)
    where = f"{model} on {tp} × {gpu or f'{memory:g} GiB'}"
    if plot is not None:
        from l4core.cli.plan_chart import memory_chart

        plot.write_text(memory_chart(f"{where}: KV memory of one request", config, setup), encoding="utf-8")
    if as_json:
        click.echo(json.dumps({**found.json(), "attention_backend": backend}, indent=2))
        return
    click.echo(f"{where}\n")
    click.echo(text_table(("each device", "", ""), list(_rows(found, backend))))
    click.echo("\n" + text_table(("requests of", "at once"), [(f"{n:,} tokens", f"{k:,}") for n, k in found.at_once]))
    click.echo("\n" + text_table(("with", "largest context", "and at once"), list(_changes(config, setup))))
    click.echo("\n" + text_table(("were KV split at start-up", "largest context"), list(_splits(found))))


def one_model(positional: str | None, option: str | None) -> str:
    """The model, named in one of the two ways. ConfigError when it is named in both or in none."""
    if positional is not None and option is not None:
        raise ConfigError(f"the model is given twice: {positional!r} and {option!r}", fix="keep one of them")
    model = positional or option
    if not model:
        raise ConfigError("no model is given", fix="l4 plan scout --gpu H100-80GB --tp 8")
    return model


def memory_of(gpu: str | None, memory: float | None) -> int:
    """Bytes of one device. ConfigError unless just one of the two is given and known."""
    from l4core.engine.start.capacity import DEVICES

    if (gpu is None) == (memory is None):
        raise ConfigError(
            "give the device with --gpu or its memory with --memory, one of the two", fix="--gpu H100-80GB"
        )
    if memory is not None:
        return int(memory * GIB)
    assert gpu is not None
    if gpu not in DEVICES:
        raise ConfigError(f"--gpu is {gpu!r}; known are {', '.join(DEVICES)}", fix="--memory GIB takes any device")
    return int(DEVICES[gpu].gib * GIB)


def formats_of(model: str, config: ModelConfig, quantization: str | None) -> Mapping[str, str] | None:
    """Parameter → format of a folder that holds quantised weights, None for any other model. Raises as the loader would."""
    from l4core.config import EngineConfig
    from l4core.engine.start.weight_formats import weight_formats
    from l4core.model.layout_quant import with_folder_scheme

    folder = Path(model)
    if not folder.is_dir() or not with_folder_scheme(config, folder).quantization_config:
        return None
    return weight_formats(EngineConfig(model=model, quantization=quantization), config, folder)


def tokens_of(context_length: str | None) -> int | None:
    """None for auto. ConfigError for what is no number."""
    if context_length in (None, "auto"):
        return None
    if not context_length.isdecimal() or not int(context_length):
        raise ConfigError(f"--context-length is {context_length!r}; wanted a number of tokens, or auto")
    return int(context_length)


def speculation_of(
    config: ModelConfig,
    draft: Path | None,
    *,
    tp: int = 1,
    num_steps: int | None = None,
    eagle_topk: int | None = None,
    num_draft_tokens: int | None = None,
    options: tuple[str, ...] = (),
) -> SpeculationPlan | None:
    """What the same flags make `l4 serve` guess with; of a draft without weights the config says enough. Raises as start-up does."""
    from l4core.config import EngineConfig
    from l4core.engine.speculation.plan import EAGLE3, plan_speculation
    from l4core.plugin_manager import load_plugins

    if draft is None:
        if num_steps or eagle_topk or num_draft_tokens or options:
            raise ConfigError("a --speculative- flag is given without a draft", fix="add --draft DIR, or drop the flag")
        return None
    if not draft.is_dir():
        raise ConfigError(f"--draft is {str(draft)!r}; wanted a folder with the config.json of an EAGLE3 draft")
    asked = EngineConfig(
        tp=tp,
        load_format="safetensors" if any(draft.glob("*.safetensors")) else "dummy",
        speculative_algorithm=EAGLE3,
        speculative_draft_model_path=str(draft),
        speculative_num_steps=num_steps,
        speculative_eagle_topk=eagle_topk,
        speculative_num_draft_tokens=num_draft_tokens,
        speculative_option=options,
    )
    return plan_speculation(asked, load_plugins(), config)


def captured(max_running: int, speculation: SpeculationPlan | None) -> list[int]:
    """Tokens of each step that is captured as a graph."""
    from l4core.engine.start.graph_sizes import LARGEST, GraphSizes, batch_sizes
    from l4core.engine.start.resolve import graph_shapes

    sizes = GraphSizes(sizes=batch_sizes(min(max_running, LARGEST)))
    return [shape.num_seqs * shape.num_tokens for shape in graph_shapes(sizes, speculation)]


def backend_of(
    config: ModelConfig,
    gpu: str | None,
    tp: int,
    kv_cache_dtype: str,
    page_size: int | None,
    max_running: int,
    num_tokens: int,
    speculation: SpeculationPlan | None,
) -> tuple[str, Usable | None]:
    """Name and verdict of the attention backend that such a device would take, of those installed here. ("", None) for a device without a name."""
    from l4core.attention.select import candidates
    from l4core.engine.start.capacity import DEVICES
    from l4core.kv.dtypes import kv_dtype_name
    from l4core.model.slicing import rank_config
    from l4core.plugin_api import AttentionRequirements, Usable
    from l4core.plugin_manager import load_plugins
    from l4core.testing.platforms import fake_platform, parse_libraries

    if gpu is None or gpu not in DEVICES:
        return "", None
    rank = rank_config(config, tp)
    num_drafts = 0 if speculation is None else speculation.num_drafts
    platform = fake_platform(DEVICES[gpu].platform, parse_libraries(LIBRARIES))
    required = AttentionRequirements(
        num_q_heads=rank.num_q_heads,
        num_kv_heads=rank.num_kv_heads,
        head_dim=rank.head_dim,
        q_dtype="bfloat16",
        kv_dtype=kv_dtype_name(kv_cache_dtype, "bfloat16", platform.arch),
        page_size=page_size,
        chunk_size=rank.attention_chunk_size if any(rank.chunked_layers) else None,
        max_num_seqs=max_running * (num_drafts + 1),
        max_num_tokens=max(num_tokens, max_running),
        num_draft_tokens=num_drafts,
        needs_tree=speculation is not None and speculation.trees,
    )
    chosen: list[Candidate] = [c for c in candidates(load_plugins().attention_backends, platform, required) if c.chosen]
    if not chosen or not isinstance(chosen[0].verdict, Usable):
        return "", None
    return chosen[0].entry.name, chosen[0].verdict


def _rows(found: Capacity, backend: str) -> Iterator[tuple[str, str, str]]:
    from l4core.engine.start.memory_budget import RUNTIME_BYTES

    kv, setup, needs = found.kv, found.setup, found.budget.needs
    cut = " or ".join(f"{count} {name}" for name, count in kv.shape.pages.items())
    waste = ", ".join(f"{share:.1%} in {name} use" for name, share in kv.waste.items())
    tokens = ", ".join(f"{size:,} {name}" for name, size in found.group_bytes.items())
    kinds = " and ".join(sorted({"bfloat16", *(setup.formats or {}).values()}))
    yield "memory", _gib(setup.memory_bytes), ""
    yield "weights", _gib(needs.weights - found.draft_bytes), setup.weights if setup.formats is None else kinds
    if setup.speculation is not None:
        guesses = f"{setup.speculation.num_drafts} guesses a step"
        yield "draft", _gib(found.draft_bytes), f"bfloat16; {guesses}; its KV lies beside the global layers'"
    yield "workspace", _gib(needs.workspace), f"of {backend}" if backend else "backend not known: not counted"
    yield "KV", _gib(found.budget.kv), f"bytes a token: {tokens}"
    yield "", "", f"superpages of {cut} pages of {kv.page_size} tokens; waste {waste}"
    yield "a step", _gib(needs.step), f"{setup.num_tokens:,} tokens, logits of {setup.max_running} rows"
    yield "block tables", _gib(needs.tables), f"{setup.max_running} rows"
    yield "graphs", _gib(needs.graphs), ""
    yield "runtime", _gib(RUNTIME_BYTES), "context, kernels, gaps"
    yield "--mem-fraction-static", f"{found.budget.fraction:.3f}", "weights, workspace and KV"
    yield "largest context", f"{kv.largest_context:,}", "tokens, prompt and answer"


def _changes(config: ModelConfig, setup: Setup) -> Iterator[tuple[str, str, str]]:
    """The largest context, and requests of the first length, as asked and with one flag changed at a time."""
    from l4core.engine.start.capacity import capacity
    from l4core.errors import CapacityError

    free = dataclasses.replace(setup, context_length=None)
    variants = {
        "what was asked": free,
        "--kv-cache-dtype fp8_e4m3": dataclasses.replace(free, kv_bytes=1),
        "--quantization fp8": dataclasses.replace(free, weights="fp8" if free.formats is None else free.weights),
        "--quantization int4": dataclasses.replace(free, weights="int4" if free.formats is None else free.weights),
        "--disable-hybrid-swa-memory": dataclasses.replace(free, hybrid=False),
        "--chunked-prefill-size 2048": dataclasses.replace(free, num_tokens=2048),
        f"--tp {2 * setup.tp}": dataclasses.replace(free, tp=2 * setup.tp),
    }
    for name, variant in variants.items():
        if variant == free and name != "what was asked":
            continue
        try:
            found = capacity(config, variant)
        except CapacityError:
            yield name, "does not fit", ""
        except ConfigError:  # so many devices cannot share this model
            continue
        else:
            at_once = f"{found.at_once[0][1]:,} of {found.at_once[0][0]:,}" if found.at_once else ""
            yield name, f"{found.kv.largest_context:,}", at_once


def _splits(found: Capacity) -> Iterator[tuple[str, str]]:
    from l4core.engine.start.capacity import RATIOS

    for ratio in RATIOS:
        note = {1.0: " (every layer keeps every token)", 0.8: " (SGLang's default)"}.get(ratio, "")
        yield f"{ratio:g} local tokens a global one{note}", f"{found.if_split(ratio):,}"
    yield "as here: one pool for both", f"{found.kv.largest_context:,}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"
