"""The least time a step can take: bytes that must be read over the device's copy rate, operations over its matrix rate. Torch-free arithmetic.

A decode step reads every weight but the embedding (a row for each token) and the experts nobody chose, and the keys and values that its requests
see. With uniform routing B tokens hit E · (1 − (1 − 1/E)^B) of E experts; random weights need not route so, hence `experts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from l4core.engine.start.capacity import element_bytes
from l4core.model.config import ModelConfig
from l4core.model.layout import ROUTED, parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Bytes of a model. routed: all routed experts of all layers.  head: the output projection, computed only where a token is drawn.
    table: the embedding, of which a step reads some rows.  rest: everything else, read by each step."""

    routed: float
    head: float
    table: float
    rest: float

    def read(self, share: float) -> float:
        """By one step that draws and hits `share` of the routed experts."""
        return self.rest + self.head + share * self.routed


def weights_of(sizes: Iterable[tuple[str, float]], *, tied: bool) -> Weights:
    """From (parameter name, bytes). tied: the head is the embedding."""
    found = {"routed": 0.0, "head": 0.0, "table": 0.0, "rest": 0.0}
    for name, size in sizes:
        if ROUTED in name:
            found["routed"] += size
        elif name.startswith("embed."):
            found["head" if tied else "table"] += size
        else:
            found["head" if name.startswith("lm_head.") else "rest"] += size
    return Weights(**found)


def weights_by_config(config: ModelConfig, weights: str = "bfloat16") -> Weights:
    """weights: one of engine.capacity.WEIGHTS."""
    sizes = ((p.name, math.prod(p.shape) * element_bytes(p, weights)) for p in parameters(config, ()))
    return weights_of(sizes, tied=config.tie_word_embeddings)


def expected_experts(num_experts: int, num_tokens: int) -> float:
    """Distinct experts that uniform routing hits."""
    return num_experts * -math.expm1(num_tokens * math.log1p(-1 / num_experts)) if num_experts > 1 else num_experts


def keys_seen(config: ModelConfig, context: int) -> int:
    """Keys that a token at position context − 1 sees, summed over the layers."""
    chunk = config.attention_chunk_size or context
    return sum((context - 1) % chunk + 1 if chunked else context for chunked in config.chunked_layers)


def decode_bytes(
    config: ModelConfig,
    weights: Weights,
    *,
    batch: int,
    context: int,
    kv_bytes: float = 2,
    experts: float | None = None,
) -> float:
    """That one decode step must read. context: tokens of each request.  kv_bytes: of one stored key or value element.  experts: distinct ones a
    layer; None = as uniform routing hits them."""
    hit = expected_experts(config.num_experts, batch) if experts is None else experts
    kv = batch * keys_seen(config, context) * 2 * config.num_kv_heads * config.head_dim * kv_bytes
    return weights.read(hit / config.num_experts) + kv


def prefill_floor_ms(
    config: ModelConfig, weights: Weights, *, batch: int, length: int, copy: float, matmul: float
) -> float:
    """Of `batch` prompts: for each kind of product the longer of computing and reading, and the attention. weights: as stored.  copy: bytes/s.
    matmul: flop/s. All experts are read."""
    rest, routed, head = _products(config, batch, length)
    linear = ((rest, weights.rest), (routed, weights.routed), (head, weights.head))
    seconds = sum(max(flops / matmul, size / copy) for flops, size in linear)
    return (seconds + attention_flops(config, batch, length) / matmul) * 1e3


def _products(config: ModelConfig, batch: int, length: int) -> tuple[float, float, float]:
    """Operations of what every token visits, of the one expert it visits, and of the head."""
    elements = weights_by_config(config)
    tokens, routed = batch * length, elements.routed / config.num_experts
    return (
        elements.rest * tokens,
        routed * tokens,
        elements.head * batch,
    )  # two operations an element, as many as it has bytes


def attention_flops(config: ModelConfig, batch: int, length: int) -> float:
    """Of scores and their products with the values, at the triangle's visible half."""
    chunk = config.attention_chunk_size or length
    whole, rest = divmod(length, chunk)
    pairs = sum(
        (whole * chunk * chunk + rest * rest) / 2 if chunked else length * length / 2
        for chunked in config.chunked_layers
    )
    return 4.0 * config.num_q_heads * config.head_dim * pairs * batch
