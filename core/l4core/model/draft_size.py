"""How large an EAGLE3 draft is, and what a token of it takes, on one of several ranks. Torch-free: `l4 plan` asks before anything is loaded."""

from __future__ import annotations

import dataclasses

from l4core.errors import ConfigError
from l4core.model.eagle3_config import DraftConfig


def rank_draft(draft: DraftConfig, ranks: int) -> DraftConfig:
    """The heads, MLP and vocabularies that one of `ranks` ranks has; sizes that all have whole are as they were. Raises ConfigError when ranks cannot
    share the draft evenly."""
    kv_even = draft.num_kv_heads % ranks == 0 or ranks % draft.num_kv_heads == 0
    sizes = (draft.num_q_heads, draft.intermediate_size, draft.draft_vocab_size, draft.vocab_size)
    wide = len(draft.aux_layers) * draft.target_hidden_size
    if not kv_even or any(size % ranks for size in (*sizes, wide)):
        raise ConfigError(
            f"{ranks} tensor-parallel ranks cannot share the draft's {draft.num_q_heads} query heads, {draft.num_kv_heads} KV heads, intermediate "
            f"size {draft.intermediate_size}, vocabulary of {draft.draft_vocab_size} tokens and {wide} inputs evenly",
            fix="another --tp, or a draft whose sizes it divides",
        )
    return dataclasses.replace(
        draft,
        num_q_heads=draft.num_q_heads // ranks,
        num_kv_heads=max(1, draft.num_kv_heads // ranks),
        intermediate_size=draft.intermediate_size // ranks,
        draft_vocab_size=draft.draft_vocab_size // ranks,
        vocab_size=draft.vocab_size // ranks,
    )


def draft_elements(draft: DraftConfig, *, own_embed: bool, own_head: bool, ranks: int = 1) -> int:
    """Parameters on a rank, norms not counted. Every matrix is cut evenly; fewer KV heads than ranks are copied.
    own_embed, own_head: whether the draft has them, or uses the target's."""
    local_kv = max(draft.num_kv_heads, ranks)
    attention = 2 * draft.hidden_size * (draft.num_q_heads + 2 * local_kv) * draft.head_dim
    attention += draft.num_q_heads * draft.head_dim * draft.hidden_size
    mlp = 3 * draft.hidden_size * draft.intermediate_size
    fc = len(draft.aux_layers) * draft.target_hidden_size * draft.hidden_size
    ends = own_embed * draft.vocab_size + own_head * draft.draft_vocab_size
    return (attention + mlp + fc + ends * draft.hidden_size) // ranks


def draft_token_elements(draft: DraftConfig, *, ranks: int = 1) -> int:
    """Held for each token of a step: aux outputs, and what the draft's layer makes of them."""
    attention = (2 * draft.num_q_heads + 2 * max(draft.num_kv_heads, ranks)) * draft.head_dim
    wide = attention + 3 * draft.intermediate_size
    return len(draft.aux_layers) * draft.target_hidden_size + 4 * draft.hidden_size + wide // ranks
