"""How a Llama 4 checkpoint in the Hugging Face layout becomes our parameters: one table, read off the model config, torch-free.

Names on the left are ours (see Llama4), on the right the checkpoint's without its prefix (`language_model.model.` or `model.`):

    embed.weight                      embed_tokens.weight
    layers.N.attn.qkv.weight          layers.N.self_attn.{q,k,v}_proj.weight           rows stacked
    layers.N.attn.o.weight            layers.N.self_attn.o_proj.weight
    layers.N.mlp.gate_up.weight       layers.N.feed_forward.{gate,up}_proj.weight      rows stacked (dense layers)
    layers.N.moe.router.weight        layers.N.feed_forward.router.weight
    layers.N.moe.shared.gate_up       layers.N.feed_forward.shared_expert.{gate,up}_proj
    layers.N.moe.experts.gate_up      layers.N.feed_forward.experts.gate_up_proj [E, H, 2I] as it is,
                                      or experts.E.{gate,up}_proj.weight [I, H], each transposed into its place
    layers.N.moe.experts.down         ….experts.down_proj [E, I, H], or experts.E.down_proj.weight [H, I] transposed

q and k rows keep the checkpoint's order (RoPE on interleaved pairs). Tensor parallelism cuts q, k, v by head, gate and up each on I,
o and down on their input side, embedding and head on vocabulary rows; router and norms are whole on every rank. Expert parallelism deals out whole
experts to groups of ranks, which cut theirs among themselves.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from l4core.model.boxes import Shape
from l4core.model.config import ModelConfig

FUSED_EXPERTS = "experts.gate_up_proj"
ROUTED = ".moe.experts."
"""In our names of the routed experts' weights, and of their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One checkpoint tensor, or one half of it, as it stands in one parameter.

    source: checkpoint name without prefix.  shape: wanted in the file.
    split: dimension of `source` that ranks cut, None = every rank takes all.  first, size: the range of that dimension this part covers
    (with split None: all of it).  unit: elements that stay together (a head).  shared: fewer units than ranks are replicated (KV heads).
    expert: index in the parameter's first dimension, None = the parameter has the source's dimensions.
    transpose: the two dimensions of `source` are swapped in the parameter.
    """

    source: str
    shape: Shape
    split: int | None = None
    first: int = 0
    size: int = 0
    unit: int = 1
    shared: bool = False
    expert: int | None = None
    transpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of ours. parts: in stacking order.  stack: dimension of the parameter along which they follow one another.
    shape: of the whole parameter (world 1).  routed: its first dimension is that of the routed experts, which expert parallelism deals out."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    stack: int = 0
    routed: bool = False

    @property
    def cut_on_inputs(self) -> bool:
        """Whether ranks cut the matrix on the side of its inputs, so that their results are added up."""
        return self.name.endswith((".attn.o.weight", ".down.weight", ".experts.down"))


def parameters(config: ModelConfig, stored: Container[str]) -> Iterator[Parameter]:
    """Every parameter of the model, in the order of a forward pass.

    stored: checkpoint names without prefix; asked only whether a layer's experts are fused or one tensor each.
    """
    vocab, hidden = config.vocab_size, config.hidden_size
    yield _rows("embed.weight", hidden, ("embed_tokens.weight", vocab))
    for layer in range(config.num_layers):
        yield from _attention(config, layer)
        if config.moe_layers[layer]:
            yield from _moe(config, layer, stored)
        else:
            yield from _mlp(
                f"layers.{layer}.mlp.", f"layers.{layer}.feed_forward.", hidden, config.intermediate_size_mlp
            )
    yield _whole("norm.weight", "norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield _rows("lm_head.weight", hidden, ("lm_head.weight", vocab))


def _attention(config: ModelConfig, layer: int) -> Iterator[Parameter]:
    ours, theirs = f"layers.{layer}.", f"layers.{layer}.self_attn."
    hidden, head = config.hidden_size, config.head_dim
    q_rows, kv_rows = config.num_q_heads * head, config.num_kv_heads * head
    yield _whole(ours + "attn_norm.weight", f"layers.{layer}.input_layernorm.weight", (hidden,))
    q = Part(source=theirs + "q_proj.weight", shape=(q_rows, hidden), split=0, size=q_rows, unit=head)
    k, v = (
        Part(source=f"{theirs}{x}_proj.weight", shape=(kv_rows, hidden), split=0, size=kv_rows, unit=head, shared=True)
        for x in "kv"
    )
    yield Parameter(name=ours + "attn.qkv.weight", shape=(q_rows + 2 * kv_rows, hidden), parts=(q, k, v))
    o = Part(source=theirs + "o_proj.weight", shape=(hidden, q_rows), split=1, size=q_rows, unit=head)
    yield Parameter(name=ours + "attn.o.weight", shape=(hidden, q_rows), parts=(o,), stack=1)
    yield _whole(ours + "mlp_norm.weight", f"layers.{layer}.post_attention_layernorm.weight", (hidden,))


def _mlp(ours: str, theirs: str, hidden: int, inter: int) -> Iterator[Parameter]:
    yield _rows(
        ours + "gate_up.weight", hidden, (theirs + "gate_proj.weight", inter), (theirs + "up_proj.weight", inter)
    )
    down = Part(source=theirs + "down_proj.weight", shape=(hidden, inter), split=1, size=inter)
    yield Parameter(name=ours + "down.weight", shape=(hidden, inter), parts=(down,), stack=1)


def _moe(config: ModelConfig, layer: int, stored: Container[str]) -> Iterator[Parameter]:
    ours, theirs = f"layers.{layer}.moe.", f"layers.{layer}.feed_forward."
    experts, hidden, inter = config.num_experts, config.hidden_size, config.intermediate_size
    yield _whole(ours + "router.weight", theirs + "router.weight", (experts, hidden))
    yield from _mlp(ours + "shared.", theirs + "shared_expert.", hidden, inter)
    first = f"{theirs}experts.0.gate_proj.weight"
    one_each = (first in stored or f"{first}_packed" in stored) and theirs + FUSED_EXPERTS not in stored
    make = _experts_one_each if one_each else _experts_fused
    gate_up, down = make(theirs + "experts.", experts, hidden, inter)
    yield Parameter(
        name=ours + "experts.gate_up", shape=(experts, hidden, 2 * inter), parts=tuple(gate_up), stack=2, routed=True
    )
    yield Parameter(name=ours + "experts.down", shape=(experts, inter, hidden), parts=tuple(down), stack=1, routed=True)


def _experts_fused(theirs: str, experts: int, hidden: int, inter: int) -> tuple[list[Part], list[Part]]:
    source, shape = theirs + "gate_up_proj", (experts, hidden, 2 * inter)
    gate_up = [Part(source=source, shape=shape, split=2, first=first, size=inter) for first in (0, inter)]
    down = [Part(source=theirs + "down_proj", shape=(experts, inter, hidden), split=1, size=inter)]
    return gate_up, down


def _experts_one_each(theirs: str, experts: int, hidden: int, inter: int) -> tuple[list[Part], list[Part]]:
    gate_up = [
        Part(
            source=f"{theirs}{e}.{half}_proj.weight",
            shape=(inter, hidden),
            split=0,
            size=inter,
            expert=e,
            transpose=True,
        )
        for e in range(experts)
        for half in ("gate", "up")
    ]
    down = [
        Part(
            source=f"{theirs}{e}.down_proj.weight",
            shape=(hidden, inter),
            split=1,
            size=inter,
            expert=e,
            transpose=True,
        )
        for e in range(experts)
    ]
    return gate_up, down


def _rows(name: str, width: int, *sources: tuple[str, int]) -> Parameter:
    """Matrices [rows, width] stacked on their rows, which ranks cut."""
    parts = tuple(Part(source=source, shape=(rows, width), split=0, size=rows) for source, rows in sources)
    return Parameter(name=name, shape=(sum(rows for _, rows in sources), width), parts=parts)


def _whole(name: str, source: str, shape: Shape) -> Parameter:
    return Parameter(name=name, shape=shape, parts=(Part(source=source, shape=shape),))
