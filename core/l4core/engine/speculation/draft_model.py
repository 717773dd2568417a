"""An EAGLE3 draft before it is loaded: what its folder says, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from l4core.model.draft_size import draft_elements, draft_token_elements
from l4core.model.eagle3_config import DraftConfig
from l4core.model.eagle3_weights import DraftPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModel:
    """An EAGLE3 draft as its folder describes it, checked against the target."""

    folder: Path
    config: DraftConfig
    plan: DraftPlan

    @property
    def num_parameters(self) -> int:
        """Its own: the target's embedding and head are not counted."""
        return self.elements_on(1)

    def elements_on(self, ranks: int) -> int:
        """The same on one of several ranks."""
        return draft_elements(self.config, own_embed=self.plan.own_embed, own_head=self.plan.own_head, ranks=ranks)

    def elements_a_token(self, ranks: int) -> int:
        """Held for each token of a step on one of `ranks` ranks: aux outputs, and what the draft's layer makes of them."""
        return draft_token_elements(self.config, ranks=ranks)

    def describe(self) -> str:
        """For the start-up report: the layers it reads are the commonest thing to be wrong."""
        c = self.config
        layers = ", ".join(map(str, c.aux_layers))
        vocab = f"{c.draft_vocab_size:,} of {c.vocab_size:,} tokens"
        return (
            f"{self.folder.name} ({c.format} format) · {self.num_parameters / 1e6:.1f} M parameters · {vocab} · reads outputs of layers {layers} · "
            f"guesses up to {c.longest_context:,} tokens of context"
        )
