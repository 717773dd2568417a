"""What eight devices would do, from one: a rank's shapes are timed on the device that is here, the sums over ranks are added as bytes over a link.

Arithmetic only; bench.rank measures. A time goes from one card to another by its floor (bench.floor): what is 1.1 × its floor here is so there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from l4core.bench.device import Rates
from l4core.bench.floor import Weights, decode_bytes, prefill_floor_ms
from l4core.model.config import ModelConfig

ACTIVATION_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """copy: bytes read and written a second.  matmul: bfloat16 operations a second."""

    copy: float
    matmul: float


CARDS: Mapping[str, Card] = {
    "H100-80GB": Card(copy=3.03e12, matmul=755e12),
    "H200": Card(copy=4.25e12, matmul=780e12),
}
"""As measured: benchmarks/results/kernels-h100-2026-11-24.json, decode-h200-2026-11-28.json."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Between the devices of one machine. bandwidth: bytes a second, each way.  latency: seconds of an all-reduce of next to nothing."""

    bandwidth: float
    latency: float

    def all_reduce(self, num_bytes: float, ranks: int) -> float:
        """Seconds. A ring sends 2·(n − 1)/n of the bytes."""
        return 0.0 if ranks == 1 else self.latency + 2 * (ranks - 1) / ranks * num_bytes / self.bandwidth


NVLINK = Link(bandwidth=370e9, latency=20e-6)
"""450 GB/s less a fifth for the protocol, as NCCL's authors say (NVIDIA/nccl-tests#212). The latency is an assumption."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`concurrency` requests at once, all of the same lengths, each followed by another when it ends."""

    concurrency: int
    input: int
    output: int

    @property
    def middle(self) -> int:
        """Tokens of a request that has half of its answer."""
        return self.input + self.output // 2

    @property
    def name(self) -> str:
        return f"{self.input}:{self.output}, {self.concurrency} at once"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A rank on the device that is here. decode_ms: of a step of the load's requests at `Load.middle`.  prefill_ms: of all their prompts.
    experts: distinct ones a layer of that decode.  layers: of the model that was run.  rates: of the device."""

    decode_ms: float
    prefill_ms: float
    experts: float
    layers: int
    rates: Rates


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One of `ranks` of the whole model. config: its shapes (model.slicing.rank_config).  weights: as they are kept.
    kv_bytes: of a stored key or value element.  step_tokens: computed in one step at most."""

    ranks: int
    config: ModelConfig
    weights: Weights
    kv_bytes: float
    step_tokens: int

    @property
    def all_reduces(self) -> int:
        """Of a step: behind attention and behind the experts of each layer, behind the embedding, and the draw's gathered pairs."""
        return 2 * self.config.num_layers + 2

    def sums(self, link: Link, tokens: int) -> float:
        """Seconds of a step's all-reduces."""
        size = tokens * self.config.hidden_size * ACTIVATION_BYTES
        return self.all_reduces * link.all_reduce(size, self.ranks)

    def decode_floor(self, load: Load, context: int, copy: float) -> float:
        """Seconds of a step, experts as uniform routing hits them."""
        read = decode_bytes(self.config, self.weights, batch=load.concurrency, context=context, kv_bytes=self.kv_bytes)
        return read / copy

    def prefill_floor(self, load: Load, card: Card) -> float:
        """Seconds of all prompts."""
        shape = {"batch": load.concurrency, "length": load.input}
        return prefill_floor_ms(self.config, self.weights, **shape, copy=card.copy, matmul=card.matmul) / 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Of one card. Times in ms: a decode step in the middle of an answer without sums over ranks, those sums, and all prompts of one round with
    theirs.  tokens_per_s: output tokens of the whole server; floor_tokens_per_s: with every step at its floor and no sums."""

    card: str
    decode_ms: float
    sums_ms: float
    prefill_ms: float
    prefill_sums_ms: float
    tokens_per_s: float
    floor_tokens_per_s: float

    @property
    def step_ms(self) -> float:
        """What a user sees between two tokens."""
        return self.decode_ms + self.sums_ms


def predict(measured: Measured, ran: Rank, whole: Rank, load: Load, card: str, link: Link) -> Prediction:
    """ran: the rank whose times were measured, which may have fewer layers than `whole`. card: a key of CARDS."""
    there = CARDS[card]
    here = Card(copy=measured.rates.copy, matmul=measured.rates.matmul)
    hit = decode_bytes(
        ran.config,
        ran.weights,
        batch=load.concurrency,
        context=load.middle,
        kv_bytes=ran.kv_bytes,
        experts=measured.experts,
    )
    decode = measured.decode_ms / 1e3 / (hit / here.copy)  # × its floor
    prefill = measured.prefill_ms / 1e3 / ran.prefill_floor(load, here)
    middle = whole.decode_floor(load, load.middle, there.copy)
    steps = [whole.decode_floor(load, load.input + n, there.copy) for n in range(1, load.output)]
    sums = whole.sums(link, load.concurrency)
    prompts = whole.prefill_floor(load, there)
    prompt_sums = sum(whole.sums(link, tokens) for tokens in _pieces(load, whole.step_tokens))
    seconds = prefill * prompts + prompt_sums + decode * sum(steps) + sums * len(steps)
    tokens = load.concurrency * load.output
    return Prediction(
        card=card,
        decode_ms=decode * middle * 1e3,
        sums_ms=sums * 1e3,
        prefill_ms=(prefill * prompts + prompt_sums) * 1e3,
        prefill_sums_ms=prompt_sums * 1e3,
        tokens_per_s=tokens / seconds,
        floor_tokens_per_s=tokens / (prompts + sum(steps)),
    )


def _pieces(load: Load, step_tokens: int) -> Iterator[int]:
    """Tokens of each step of all prompts."""
    left = load.concurrency * load.input
    for _ in range(math.ceil(left / step_tokens)):
        yield min(left, step_tokens)
        left -= step_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Output tokens/s of a server somebody measured. weights: as `l4 plan` names them."""

    model: str
    card: str
    ranks: int
    weights: str
    load: Load
    tokens_per_s: float
    source: str


VLLM = "vLLM 0.8.3, April 2025, at most 64 at once: https://blog.vllm.ai/2025/04/05/llama4.html"
_LOADS = tuple(Load(concurrency=64, input=n, output=1000) for n in (1000, 5000, 10000))
_VLLM: Sequence[tuple[str, str, str, tuple[int, int, int]]] = (
    ("scout", "bfloat16", "H100-80GB", (2647, 2158, 1740)),
    ("scout", "bfloat16", "H200", (2997, 2344, 1971)),
    ("maverick", "fp8", "H100-80GB", (3164, 2444, 1663)),
    ("maverick", "fp8", "H200", (3552, 2788, 2381)),
)
PUBLISHED = tuple(
    Published(model=model, card=card, ranks=8, weights=weights, load=load, tokens_per_s=rate, source=VLLM)
    for model, weights, card, rates in _VLLM
    for load, rate in zip(_LOADS, rates, strict=True)
)
"""Figures for whole machines, as their makers gave them; another version, another year, another machine."""


def published(model: str, card: str, ranks: int, weights: str, load: Load) -> Published | None:
    """The figure for just this, if there is one."""
    wanted = (model, card, ranks, weights, load)
    return next((p for p in PUBLISHED if (p.model, p.card, p.ranks, p.weights, p.load) == wanted), None)


def assumptions(measured: Measured, whole: Rank, load: Load, link: Link, weights: str = "bfloat16") -> list[str]:
    """Sentences: what stands between the measurement and the prediction."""
    said = [
        f"one of {whole.ranks} ranks was run here: its shapes, random weights, this engine with its scheduler, graphs and draw",
        "a step's time moves to another card by its floor: bytes over the copy rate, prompts' operations over the matrix rate",
        f"uniform routing; the measured step hit {measured.experts:.1f} of {whole.config.num_experts} experts a layer",
        f"{whole.all_reduces} sums over ranks a step, one after the other, none hidden: {link.latency * 1e6:g} µs each and 2·(n−1)/n of "
        f"{ACTIVATION_BYTES} bytes an activation over {link.bandwidth / 1e9:g} GB/s",
        f"rounds of {load.concurrency} prompts and their answers, every answer of {load.output} tokens; text and HTTP are hidden behind the device",
    ]
    if weights != "bfloat16":
        said.insert(
            1,
            f"all weights that --quantization {weights} takes are in {weights}; a checkpoint may keep some of them plain",
        )
    if measured.rates.dtype != "bfloat16":
        said.insert(1, f"it ran in {measured.rates.dtype}; the prediction is for bfloat16 activations")
    if measured.layers < whole.config.num_layers:
        said.insert(1, f"{measured.layers} of {whole.config.num_layers} layers were run, the rest goes by its floor")
    return said
