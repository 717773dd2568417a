"""How large an EAGLE3 draft is, and what a token of it takes, on one of several ranks. Torch-free: `l4 plan` asks before anything is loaded."""

from __future__ import annotations

from l4core.errors import ConfigError
from l4core.model.config import ModelConfig
from l4core.model.eagle3_config import DraftConfig


def check_draft_kv(draft: DraftConfig, target: ModelConfig) -> None:
    """Raises ConfigError for a draft whose keys and values do not fit beside the target's."""
    if (draft.num_kv_heads, draft.head_dim) != (target.num_kv_heads, target.head_dim):
        raise ConfigError(
            f"the draft has {draft.num_kv_heads} KV heads of {draft.head_dim}, the model {target.num_kv_heads} of {target.head_dim}; the draft's "
            "keys and values lie beside the model's",
            fix="a draft made for this model",
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
