"""The kit for samplers: a pure, row-independent change of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch

from l4core import plugin_compat
from l4core.plugin_api import Sampler, SamplerEntry, SamplerRow, SamplingParams
from l4core.plugin_entries import Provided, create_object
from l4core.testing.conformance.entry import assert_value_error, find_entry

__all__ = ["SamplerConformance"]

VOCAB_SIZE = 211


class SamplerConformance:
    """Set `plugin`, `sampler` and the arguments requests may send. good_args: valid `sampler_args`, the first ones that do something;
    bad_args: each must be refused by `parse` with a ValueError."""

    plugin: ClassVar[str]
    sampler: ClassVar[str]
    good_args: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    bad_args: ClassVar[Sequence[Mapping[str, Any]]] = ({"no such argument": 1},)

    @property
    def entry(self) -> SamplerEntry:
        return find_entry(self.plugin, "l4_samplers", self.sampler, SamplerEntry)

    def make(self) -> Sampler:
        return create_object(Provided(entry=self.entry, distribution=self.plugin, version="under test"), Sampler)  # type: ignore[type-abstract]

    def params(self) -> list[SamplingParams]:
        """Different requests, so that a row that leaks into its neighbour shows."""
        varied: tuple[dict[str, Any], ...] = (
            {},
            {"temperature": 0.0},
            {"temperature": 0.3, "top_k": 5},
            {"top_p": 0.5, "min_p": 0.05},
            {"presence_penalty": 1.5, "frequency_penalty": -0.5, "repetition_penalty": 1.3},
            {"logit_bias": {3: 50.0, 7: -100.0}, "top_k": 1},
        )
        return [
            SamplingParams(sampler=self.sampler, sampler_args=args, **fields)
            for args in self.good_args
            for fields in varied
        ]

    def rows(self, sampler: Sampler) -> list[SamplerRow]:
        return [
            SamplerRow(
                params=params,
                parsed=sampler.parse(params),
                prompt_token_ids=tuple(range(i, i + 4)),
                output_token_ids=tuple(range(20, 20 + i % 5)) * 2,
                position=4 + 2 * (i % 5),
            )
            for i, params in enumerate(self.params())
        ]

    def logits(self, num_rows: int) -> torch.Tensor:
        """float32 [num_rows, VOCAB_SIZE]: peaked and flat rows, some tokens forbidden already."""
        draw = torch.Generator().manual_seed(5)
        logits = torch.randn(num_rows, VOCAB_SIZE, generator=draw) * torch.linspace(0.1, 6.0, num_rows)[:, None]
        logits[:, 11] = -torch.inf
        return logits

    def transformed(self, sampler: Sampler, rows: Sequence[SamplerRow], logits: torch.Tensor) -> torch.Tensor:
        found = sampler.transform(logits.clone(), rows)
        assert found.shape == logits.shape, f"shape {tuple(found.shape)}; wanted {tuple(logits.shape)}"
        assert found.dtype == torch.float32, f"dtype {found.dtype}; wanted float32"
        return found

    def test_entry_is_served_by_this_core(self) -> None:
        assert self.entry.api in plugin_compat.served(), (
            f"api {self.entry.api}; this core serves {plugin_compat.served()}"
        )

    def test_a_row_does_not_depend_on_others(self) -> None:
        """Alone, in the batch, and in the batch reversed: the same numbers, bit for bit."""
        sampler = self.make()
        rows = self.rows(sampler)
        logits = self.logits(len(rows))
        together = self.transformed(sampler, rows, logits)
        backwards = self.transformed(sampler, rows[::-1], logits.flip(0)).flip(0)
        for i, row in enumerate(rows):
            alone = self.transformed(sampler, [row], logits[i : i + 1])[0]
            assert torch.equal(alone, together[i]), f"row {i} differs alone: {row.params}"
            assert torch.equal(backwards[i], together[i]), f"row {i} differs in another order: {row.params}"

    def test_every_row_keeps_a_token(self) -> None:
        sampler = self.make()
        rows = self.rows(sampler)
        found = self.transformed(sampler, rows, self.logits(len(rows)))
        assert not found.isnan().any()
        for i, row in enumerate(rows):
            assert found[i].isfinite().any(), f"no token is left in row {i}: {row.params}"

    def test_a_forbidden_token_stays_forbidden(self) -> None:
        """Core and earlier samplers forbid with −inf; nothing may bring such a token back."""
        sampler = self.make()
        rows = self.rows(sampler)
        found = self.transformed(sampler, rows, self.logits(len(rows)))
        assert found[:, 11].isneginf().all()

    def test_same_input_same_output(self) -> None:
        """No randomness of its own, nothing remembered: the draw is core's."""
        sampler, other = self.make(), self.make()
        rows = self.rows(sampler)
        logits = self.logits(len(rows))
        first = self.transformed(sampler, rows, logits)
        torch.rand(3)
        assert torch.equal(first, self.transformed(sampler, rows, logits))
        assert torch.equal(first, self.transformed(other, rows, logits))

    def test_rows_are_not_changed(self) -> None:
        sampler = self.make()
        rows = self.rows(sampler)
        listed = [
            replace(row, prompt_token_ids=list(row.prompt_token_ids), output_token_ids=list(row.output_token_ids))
            for row in rows
        ]
        self.transformed(sampler, listed, self.logits(len(rows)))
        for row, after in zip(rows, listed, strict=True):
            assert tuple(after.prompt_token_ids) == row.prompt_token_ids
            assert tuple(after.output_token_ids) == row.output_token_ids

    def test_bad_arguments_are_value_errors(self) -> None:
        sampler = self.make()
        for args in self.bad_args:
            params = SamplingParams(sampler=self.sampler, sampler_args=args)
            assert_value_error(partial(sampler.parse, params), str(args))
