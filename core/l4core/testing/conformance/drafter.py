"""The kit for drafters: shapes, ids, parents, memory of requests. How often it is right is its own affair."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

import pytest

from l4core import plugin_compat
from l4core.engine.batch import Draft
from l4core.engine.speculation.drafter import drafts_of
from l4core.errors import PluginError
from l4core.plugin_api import DraftContext, Drafter, DrafterEntry, DraftRow, SamplingParams
from l4core.plugin_entries import Provided, create_object
from l4core.sampling.verify import depths
from l4core.testing.conformance.entry import find_entry

__all__ = ["DrafterConformance"]

VOCAB_SIZE = 97
NUM_STEPS = 12


class DrafterConformance:
    """Set `plugin` and `drafter`. good_options: `--speculative-option`s it must take; bad_options: each must be refused by `create` with an error."""

    plugin: ClassVar[str]
    drafter: ClassVar[str]
    good_options: ClassVar[Sequence[Mapping[str, str]]] = ({},)
    bad_options: ClassVar[Sequence[Mapping[str, str]]] = ()

    @property
    def entry(self) -> DrafterEntry:
        return find_entry(self.plugin, "l4_drafters", self.drafter, DrafterEntry)

    def make(self, num_draft_tokens: int = 4, options: Mapping[str, str] | None = None) -> Drafter:
        context = DraftContext(
            vocab_size=VOCAB_SIZE,
            num_draft_tokens=num_draft_tokens,
            device="cpu",
            options=self.good_options[0] if options is None else options,
            logger=logging.getLogger(self.plugin),
        )
        provided = Provided(entry=self.entry, distribution=self.plugin, version="under test")
        return create_object(provided, Drafter, context)  # type: ignore[type-abstract]

    def rows(self, step: int = 0, max_tokens: int = 4) -> list[DraftRow]:
        """Requests of different lengths at step `step`: one repeats itself, one never does, one has a prompt of one token."""
        prompts: tuple[Sequence[int], ...] = ([3], [1, 2, 3] * 5, list(range(40)), [7] * 9)
        return [
            DraftRow(
                request_id=f"request {i}",
                params=SamplingParams(temperature=0.5 * i, seed=i),
                prompt_token_ids=prompt,
                output_token_ids=[(5 * i + j * j) % VOCAB_SIZE for j in range(step * (i + 1))],
                max_tokens=max_tokens,
            )
            for i, prompt in enumerate(prompts)
        ]

    def drafts(self, drafter: Drafter, rows: Sequence[DraftRow], num_draft_tokens: int = 4) -> list[Draft]:
        """What core makes of the answer; it refuses shapes, ids and parents that may not be."""
        return drafts_of(*drafter.propose(rows), len(rows), num_draft_tokens, VOCAB_SIZE)

    def test_entry_is_served_by_this_core(self) -> None:
        assert self.entry.api in plugin_compat.served(), (
            f"api {self.entry.api}; this core serves {plugin_compat.served()}"
        )

    def test_answers_are_drafts(self) -> None:
        """Over many steps, for one row and for many, with rows that come and go and a new order each time."""
        for options in self.good_options:
            for num_draft_tokens in (1, 4):
                drafter = self.make(num_draft_tokens, options)
                for step in range(NUM_STEPS):
                    rows = self.rows(step, num_draft_tokens)
                    self.drafts(drafter, rows[step % 4 :] + rows[: step % 3], num_draft_tokens)
                    self.drafts(drafter, rows[:1], num_draft_tokens)

    def test_trees_are_declared(self) -> None:
        drafter = self.make()
        for step in range(NUM_STEPS):
            for draft in self.drafts(drafter, self.rows(step)):
                assert self.entry.trees or not draft.parents, (
                    f"a tree was proposed; the entry does not say trees=True: {draft}"
                )
                assert max(depths(len(draft.token_ids), draft.parents)) <= 4

    def test_rows_are_not_changed(self) -> None:
        drafter, rows = self.make(), self.rows(3)
        before = [(list(row.prompt_token_ids), list(row.output_token_ids)) for row in rows]
        self.drafts(drafter, rows)
        assert before == [(list(row.prompt_token_ids), list(row.output_token_ids)) for row in rows]

    def test_ids_can_be_used_again_after_forget(self) -> None:
        """A request may end and its id come back with other tokens; ids that were never there are no error."""
        drafter = self.make()
        self.drafts(drafter, self.rows(5))
        drafter.forget([row.request_id for row in self.rows()] + ["nobody"])
        self.drafts(drafter, self.rows(0))
        self.drafts(drafter, self.rows(1))

    def test_bad_options_are_refused(self) -> None:
        for options in self.bad_options:
            with pytest.raises(PluginError) as refused:
                self.make(options=options)
            assert str(refused.value).strip(), f"{options} is refused without a text"
