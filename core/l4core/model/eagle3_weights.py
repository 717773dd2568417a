"""An EAGLE3 draft's weights: where each tensor of either format goes, checked from names and shapes alone, then read.

Every tensor must be known and used: a norm that a config forgets to mention would otherwise be left out in silence, and only acceptance would tell.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from l4core.errors import CheckpointError
from l4core.model.eagle3 import Eagle3
from l4core.model.eagle3_config import DraftConfig, Target
from l4core.model.safetensors_index import ITEM_SIZES, StoredTensor, read_folder

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
LAYER = {"eagle": "midlayer.", "speculators": "layers.0."}
LEGACY_NORMS = ("aux_norm_low.weight", "aux_norm_mid.weight", "aux_norm_high.weight")
UNUSED = ("t2d",)
"""A mask over the target's vocabulary; `d2t` says the same."""
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One stored tensor → rows of a parameter, behind those of the piece before. cut: dimension that ranks share, in `units` that stay together
    (heads; 0 = its elements); fewer units than ranks are copied.  turned: q or k rows, to be interleaved head by head."""

    source: str
    parameter: str
    shape: Shape
    cut: int | None = None
    units: int = 0
    turned: bool = False

    def share(self, rank: int, world: int) -> tuple[int, int]:
        """(first, number) of the elements of dimension `cut` that a rank takes."""
        assert self.cut is not None
        size = self.shape[self.cut]
        units = self.units or size
        width = size // units
        if units < world:
            return rank * units // world * width, width
        return rank * units // world * width, units // world * width


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """own_embed, own_head: whether the draft brings them, else the target's are used."""

    pieces: tuple[Piece, ...]
    own_embed: bool
    own_head: bool


def plan_draft(config: DraftConfig, target: Target, stored: Mapping[str, Shape]) -> DraftPlan:
    """stored: shapes by name. CheckpointError that lists what is missing, unknown or of another shape."""
    own_embed, own_head = "embed_tokens.weight" in stored, "lm_head.weight" in stored
    plan = DraftPlan(pieces=tuple(_pieces(config, stored, own_embed, own_head)), own_embed=own_embed, own_head=own_head)
    problems = [*_misfits(plan, stored), *_sharing(config, target, plan)]
    if problems:
        raise CheckpointError("the draft's tensors do not fit its config:\n  " + "\n  ".join(problems[:8]))
    return plan


def load_draft(folder: Path, config: DraftConfig, target: Target, draft: Eagle3, plan: DraftPlan) -> int:
    """Fills the draft's parameters in place, those of its rank, converting values → bytes read."""
    index, ranks = read_folder(folder), draft.ranks
    parameters = {**dict(draft.named_parameters()), **dict(draft.named_buffers())}
    filled, total = Counter[str](), 0
    for piece in plan.pieces:
        values = _read(folder, index.tensors[piece.source])  # a view of the file: only what is copied is read
        if piece.cut is not None:
            values = values.narrow(piece.cut, *piece.share(ranks.rank, ranks.size))
        total += values.nbytes
        if piece.turned:
            values = interleaved(values, len(values) // config.head_dim)
        begin = filled[piece.parameter]
        filled[piece.parameter] += len(values)
        parameters[piece.parameter].detach()[begin : begin + len(values)].copy_(values)
    _check_ids(draft, target)
    return total


def stored_shapes(folder: Path) -> Mapping[str, Shape]:
    """Names and shapes of a draft folder. CheckpointError when its headers contradict themselves."""
    index = read_folder(folder)
    if index.problems:
        raise CheckpointError(f"{folder}: {index.problems[0].text}", fix="copy or download the files again")
    return {name: tensor.shape for name, tensor in index.tensors.items()}


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """q or k rows in Llama's order, where row i of a head turns with row i + D/2, in Llama 4's, where rows 2i and 2i + 1 turn together."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # type: ignore[no-untyped-call, no-any-return]


def _pieces(config: DraftConfig, stored: Mapping[str, Shape], own_embed: bool, own_head: bool) -> Iterator[Piece]:
    size, wide, ffn = config.hidden_size, config.target_hidden_size, config.intermediate_size
    q, kv = config.num_q_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer, num_aux = LAYER[config.format], len(config.aux_layers)
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    yield Piece(source="fc.weight", parameter="fc.weight", shape=(size, num_aux * wide), cut=1)
    yield Piece(source="norm.weight", parameter="norm.weight", shape=(size,))
    for source, norm in (("input_layernorm", "embed"), ("hidden_norm", "hidden"), ("post_attention_layernorm", "mlp")):
        yield Piece(source=f"{layer}{source}.weight", parameter=f"{norm}_norm.weight", shape=(size,))
    for name, rows, units in (
        ("q", q, config.num_q_heads),
        ("k", kv, config.num_kv_heads),
        ("v", kv, config.num_kv_heads),
    ):
        yield Piece(
            source=f"{attention}{name}_proj.weight",
            parameter="qkv.weight",
            shape=(rows, 2 * size),
            cut=0,
            units=units,
            turned=name != "v",
        )
    yield Piece(source=f"{attention}o_proj.weight", parameter="o.weight", shape=(size, q), cut=1)
    for name in ("gate", "up"):
        yield Piece(source=f"{mlp}{name}_proj.weight", parameter="mlp.gate_up.weight", shape=(ffn, size), cut=0)
    yield Piece(source=f"{mlp}down_proj.weight", parameter="mlp.down.weight", shape=(size, ffn), cut=1)
    if config.norm_before_fc:
        yield Piece(source="input_norm.weight", parameter="input_norm.weight", shape=(num_aux * wide,))
    if config.fc_norm:
        legacy = LEGACY_NORMS[0] in stored
        for i in range(num_aux):
            source = LEGACY_NORMS[i] if legacy else f"fc_norm.{i}.weight"
            yield Piece(source=source, parameter=f"fc_norm.{i}.weight", shape=(wide,))
    if own_embed:
        yield Piece(source="embed_tokens.weight", parameter="embed.weight", shape=(config.vocab_size, size), cut=0)
    if own_head:
        yield Piece(source="lm_head.weight", parameter="lm_head.weight", shape=(config.draft_vocab_size, size), cut=0)
    if config.draft_vocab_size < config.vocab_size or "d2t" in stored:
        yield Piece(source="d2t", parameter="d2t", shape=(config.draft_vocab_size,))


def _misfits(plan: DraftPlan, stored: Mapping[str, Shape]) -> Iterator[str]:
    for piece in plan.pieces:
        found = stored.get(piece.source)
        if found is None:
            yield f"{piece.source} {list(piece.shape)} is missing"
        elif tuple(found) != piece.shape:
            yield f"{piece.source} is {list(found)}; the config makes it {list(piece.shape)}"
    known = {piece.source for piece in plan.pieces}
    for name in sorted(stored.keys() - known - set(UNUSED)):
        yield f"{name} {list(stored[name])} is in the files, and the config has no place for it"


def _sharing(config: DraftConfig, target: Target, plan: DraftPlan) -> Iterator[str]:
    """What an absent embedding or head needs of the target's."""
    if config.target_hidden_size != target.hidden_size:
        yield f"it reads hidden states of {config.target_hidden_size}; the target's are {target.hidden_size}"
    for own, name in ((plan.own_embed, "embed_tokens.weight"), (plan.own_head, "lm_head.weight")):
        if not own and config.hidden_size != target.hidden_size:
            yield f"{name} is missing, and the target's has rows of {target.hidden_size}, not {config.hidden_size}"
    if not plan.own_head and config.draft_vocab_size != target.vocab_size:
        yield f"lm_head.weight is missing, and the draft vocabulary of {config.draft_vocab_size} is not the target's {target.vocab_size}"


def _read(folder: Path, tensor: StoredTensor) -> torch.Tensor:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CheckpointError(f"{tensor.name} of the draft is {tensor.dtype}; wanted one of {', '.join(DTYPES)}")
    base = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
    with (folder / tensor.shard).open("rb") as file:
        memory = mmap.mmap(file.fileno(), tensor.stop - base, access=mmap.ACCESS_COPY, offset=base)
    count = (tensor.stop - tensor.start) // ITEM_SIZES[tensor.dtype]
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=tensor.start - base).view(tensor.shape)


def _check_ids(draft: Eagle3, target: Target) -> None:
    ids = draft.target_ids(torch.arange(draft.config.draft_vocab_size, device=draft.fc.weight.device))
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= target.vocab_size:
        raise CheckpointError(
            f"d2t leads to target ids {low} … {high}; the vocabulary has {target.vocab_size} (d2t holds offsets: target id = i + d2t[i])"
        )
