"""The draft's two steps of fixed shape, as functions of device memory alone: what graphs are captured from.

extend  (B, n)  B sequences of n rows the target just computed, padding before them (engine.run.padding) where there are fewer → their next hidden
                states, noted by block-table row
guess   (B, k)  k guesses for each of B sequences, all k passes in one graph
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from l4core.attention.step_rows import StepRows
from l4core.engine.run.fixed_step import StepShape
from l4core.engine.run.forward import ForwardPlanner, Phase
from l4core.engine.run.padding import AuxRows, spread
from l4core.model.eagle3 import Eagle3
from l4core.ops.device import has_kernels
from l4core.platform import copies_ahead
from l4core.sampling.noise import gumbel_noise_at

CANDIDATES = 32
"""So many likely tokens of a sampled row get the noise where no kernel gives it to all; what the target draws is nearly always among them."""
Ints = npt.NDArray[np.int64]


class DraftState:
    """What outlives a step: hidden [rows, H], each block-table row's hidden state that its next guesses start from; the last row is padding's."""

    def __init__(self, draft: Eagle3, planner: ForwardPlanner, pending: torch.Tensor, *, max_context: int) -> None:
        """planner: of the global group.  pending: the runner's, where guesses are left that the host does not know yet."""
        self.draft, self.planner, self.pending, self.max_context = draft, planner, pending, max_context
        weight = draft.norm.weight
        num_rows = planner.tables.padding_row + 1
        self.hidden = torch.zeros(num_rows, draft.config.hidden_size, dtype=weight.dtype, device=weight.device)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def guess(
        self, hidden: torch.Tensor, temperature: torch.Tensor | None, seeds: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """int64 [B] target ids: what the law would draw at `positions` from the draft's logits, masks and penalties apart. temperature: float32 [B],
        None = all are greedy."""
        if has_kernels(hidden) and self.draft.ranks.size == 1:
            from l4core.engine.speculation.draft_draw_triton import draw_guesses

            return draw_guesses(self.draft.logits(hidden), self.draft.d2t, temperature, seeds, positions)  # type: ignore[arg-type]
        if temperature is None:
            return self.draft.likeliest(hidden, 1)[1][:, 0]
        values, tokens = self.draft.likeliest(hidden, min(CANDIDATES, self.draft.config.draft_vocab_size))
        heat = temperature.unsqueeze(1)
        scores = (values - values[:, :1]) / heat.clamp(min=1e-6)
        scores = torch.where(heat > 0, scores + gumbel_noise_at(seeds, positions, tokens), scores)
        return tokens.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]


class FixedExtend:
    """inputs: int64 [4 + n, B] on the device: rows, starts, positions of the first of n rows, which of them drew the last token, the token after
    each.  aux: [B · n, …]."""

    def __init__(self, shape: StepShape, state: DraftState, aux: torch.Tensor) -> None:
        """aux: memory that all shapes share, as long as the largest needs."""
        self.shape = shape
        self._state = state
        num_seqs, num_rows = shape
        device = state.device
        self.aux = aux[: num_seqs * num_rows]
        self._inputs = torch.zeros(4 + num_rows, num_seqs, dtype=torch.int64, device=device)
        self._inputs[0] = state.planner.tables.padding_row
        self._owner = torch.arange(num_seqs, dtype=torch.int32, device=device).repeat_interleave(num_rows)
        self._steps = torch.arange(num_rows, device=device).repeat(num_seqs)
        self._first = torch.arange(0, num_seqs * num_rows, num_rows, device=device)
        self._cu_seqlens = torch.arange(0, (num_seqs + 1) * num_rows, num_rows, dtype=torch.int32, device=device)

    def fill(self, rows: Ints, starts: Ints, lengths: Ints, last: Ints, following: Ints, aux: AuxRows) -> None:
        """lengths: rows of each sequence, starts + lengths ≥ n.  last: the one of those that drew the last token.  following: [sum of lengths]."""
        num_rows = self.shape.num_tokens
        padding = num_rows - lengths
        lines = (rows, starts, starts - padding, last + padding, *spread(following, num_rows, lengths).T)
        _send(self._inputs, lines, self._state.planner.tables.padding_row)
        aux.write_to(self.aux, num_rows, lengths)

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        """No host sync. → nothing of interest: the hidden states are in the state."""
        state, inputs, num_rows = self._state, self._inputs, self.shape.num_tokens
        rows, starts, begins, last = inputs[:4]
        step = StepRows(
            rows=rows.int(),
            starts=starts.int(),
            seq_lens=(begins + num_rows).int(),
            positions=begins[self._owner] + self._steps,
            owner=self._owner,
        )
        phase = _phase(self.shape, self._cu_seqlens, state.max_context)
        following = inputs[4:].t().reshape(-1)
        forward = state.planner.plan(following, step, [phase], self._first[:0], longest=None)
        planner = state.planner
        hidden: torch.Tensor = state.draft(forward, state.draft.combine(self.aux), planner.memory, planner.backend)
        state.hidden.index_copy_(0, rows, hidden.index_select(0, self._first + last))
        return hidden


class FixedGuess:
    """inputs: int64 [5, B] on the device: rows, lengths, last slots, seeds, bits of float64 temperatures. A length counts the tokens known so far, of
    which all but the last have been computed. No pass writes behind a sequence's last slot: what lies there in the tables may be another's."""

    def __init__(self, shape: StepShape, state: DraftState, *, sampled: bool) -> None:
        """shape: (sequences, guesses).  sampled: some are not greedy."""
        self.shape = shape
        self._state, self._sampled = state, sampled
        num_seqs, device = shape.num_seqs, state.device
        self._inputs = torch.zeros(5, num_seqs, dtype=torch.int64, device=device)
        self._inputs[0] = state.planner.tables.padding_row
        self._owner = torch.arange(num_seqs, dtype=torch.int32, device=device)
        self._cu_seqlens = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)

    @property
    def rows(self) -> torch.Tensor:
        """int64 [B] on the device, padding's row among them."""
        return self._inputs[0]

    def fill(self, rows: Ints, lengths: Ints, slots: Ints, seeds: Ints, temperature: npt.NDArray[np.float64]) -> None:
        """slots: position of each sequence's last one."""
        lines = (rows, lengths, slots, seeds, temperature.view(np.int64))
        _send(self._inputs, lines, self._state.planner.tables.padding_row)

    @torch.inference_mode()
    def run(self) -> torch.Tensor:
        """→ int64 [k, B] target ids. No host sync."""
        state, num_seqs = self._state, self.shape.num_seqs
        rows, lengths, slots, seeds, bits = _apart(self._inputs)
        temperature = bits.view(torch.float64).float() if self._sampled else None
        hidden = state.hidden.index_select(0, rows[:num_seqs])
        steps = torch.arange(self.shape.num_tokens, device=rows.device).unsqueeze(1)
        drawn_at = lengths + steps  # [k, B or a few more]
        positions = torch.minimum(drawn_at - 1, slots).clamp_(min=0)
        starts, seq_lens, rows_ = positions.int(), positions.int() + 1, rows[:num_seqs].int()
        positions, starts, seq_lens, drawn_at = (x[:, :num_seqs] for x in (positions, starts, seq_lens, drawn_at))
        seeds, temperature = seeds[:num_seqs], None if temperature is None else temperature[:num_seqs]
        phase = _phase(StepShape(num_seqs, 1), self._cu_seqlens, state.max_context)
        planner, guesses = state.planner, [state.guess(hidden, temperature, seeds, drawn_at[0])]
        for step in range(self.shape.num_tokens - 1):
            at = StepRows(
                rows=rows_,
                starts=starts[step],
                seq_lens=seq_lens[step],
                positions=positions[step],
                owner=self._owner,
            )
            forward = planner.plan(guesses[-1], at, [phase], self._owner[:0], longest=None)
            hidden = state.draft(forward, hidden, planner.memory, planner.backend)
            guesses.append(state.guess(hidden, temperature, seeds, drawn_at[step + 1]))
        return torch.stack(guesses)


def _apart(lines: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The lines of [n, B], each beginning at a multiple of 16 bytes, and a few columns of zeros behind it: kernels are compiled apart for memory
    that begins elsewhere."""
    return F.pad(lines, (0, -lines.shape[1] % 4)).unbind()


def _phase(shape: StepShape, cu_seqlens: torch.Tensor, max_context: int) -> Phase:
    return Phase(
        name="decode" if shape.num_tokens == 1 else "verify",
        first=0,
        last=shape.num_seqs,
        begin=0,
        end=shape.num_seqs * shape.num_tokens,
        cu_seqlens_q=cu_seqlens,
        max_seqlen_q=shape.num_tokens,
        max_seqlen_k=max_context,
    )


def _send(inputs: torch.Tensor, lines: tuple[Ints, ...], padding_row: int) -> None:
    """Queue one array a line; what is left of the width is padding."""
    host = torch.zeros(inputs.shape, dtype=torch.int64, pin_memory=copies_ahead(inputs.device.type))
    array = host.numpy()
    array[0] = padding_row
    for place, line in zip(array, lines, strict=True):
        place[: len(line)] = line
    inputs.copy_(host, non_blocking=True)
