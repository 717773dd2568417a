"""A step of fixed shape, as a function of device memory alone: what a graph is captured from. Run as it is, it launches the same kernels, so a replay
and an eager run of one shape give the same bits.

Shape (B, n): B sequences of n new tokens each. n = 1 is decode. Verifying k drafts is (B, k + 1): the drafts are written into `inputs`, or left on
the device by a drafter, the target's own draw of every row comes out, and who calls compares the two. A sequence of fewer tokens has padding before
them (engine.run.padding), of which only the position of its first row tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from l4core.attention.step_rows import StepRows
from l4core.engine.run.forward import ForwardPlanner, Phase
from l4core.engine.run.padding import AuxRows, spread
from l4core.model.llama4 import Llama4
from l4core.platform import copies_ahead

if TYPE_CHECKING:
    from l4core.engine.run.fixed_step_triton import Unpacked


class StepShape(NamedTuple):
    """num_seqs: sequences, padding among them.  num_tokens: new tokens of each."""

    num_seqs: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What a forward pass left on the device; that of a fixed step is overwritten by the next one. hidden: [T, H], after the last norm.
    aux: outputs of the model's aux layers, or None.  logits: [R, V / ranks] in the compute dtype, of the rows that draw, or None.
    drawn: int64 [2, R] as draw_triton.draw_rows gives it, or None."""

    hidden: torch.Tensor
    aux: AuxRows | None = None
    logits: torch.Tensor | None = None
    drawn: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRequests:
    """One step's sequences on the host, in the batch's order. rows: block-table row.  starts: position of the first new token.  lengths: new tokens.
    token_ids: int64 [sum of lengths], or PENDING.  The rest as in draws.RowParams."""

    rows: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    token_ids: npt.NDArray[np.int64]
    temperature: npt.NDArray[np.float64]
    log_min_p: npt.NDArray[np.float64]
    seed: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.int64]


class StepOutputs:
    """Where steps of all shapes leave what they computed: the results of one shape take no memory beside another's."""

    def __init__(self, num_rows: int, model: Llama4, device: torch.device) -> None:
        """num_rows: token rows of the largest shape."""
        dtype = model.embed.weight.dtype
        self.logits = torch.empty(num_rows, model.num_logits, dtype=dtype, device=device)
        self.aux = model.new_aux(num_rows)
        self._drawn = torch.empty(2 * num_rows, dtype=torch.int64, device=device)

    def drawn(self, num_rows: int) -> torch.Tensor:
        """int64 [2, num_rows], contiguous."""
        return self._drawn[: 2 * num_rows].view(2, num_rows)


class FixedStep:
    """inputs: int64 [7 + n, B] on the device: rows, starts, positions of the first of n rows (padding's, where there is some), seeds, top-p, bits of
    float64 temperatures and log min-p, token ids."""

    def __init__(
        self,
        shape: StepShape,
        model: Llama4,
        planner: ForwardPlanner,
        outputs: StepOutputs,
        pending: torch.Tensor,
        max_context: int,
    ) -> None:
        """pending: int64 [lines, max_running + 1], as Runner's; read for PENDING ids, and line 0 written with what a decode draws."""
        self.shape = shape
        self._model = model
        self._planner = planner
        self._outputs = outputs
        self._pending = pending
        self._max_context = max_context
        device, (num_seqs, num_tokens) = pending.device, shape
        self.inputs = torch.zeros(7 + num_tokens, num_seqs, dtype=torch.int64, device=device)
        self._cu_seqlens = torch.arange(0, (num_seqs + 1) * num_tokens, num_tokens, dtype=torch.int32, device=device)
        self._owner = torch.arange(num_seqs, dtype=torch.int32, device=device).repeat_interleave(num_tokens)
        self._every_row = torch.arange(num_seqs * num_tokens, device=device)
        self.inputs[0] = planner.tables.padding_row

    def fill(self, requests: StepRequests) -> None:
        """Queue the inputs. What is left of the shape is padding: a token 0 at position 0 of the null page."""
        num, device = len(requests.rows), self.inputs.device
        host = torch.zeros(self.inputs.shape, dtype=torch.int64, pin_memory=copies_ahead(device.type))
        array = host.numpy()
        array[0] = self._planner.tables.padding_row
        array[0, :num] = requests.rows
        array[1, :num] = requests.starts
        array[2, :num] = requests.starts + requests.lengths - self.shape.num_tokens
        array[3, :num] = requests.seed
        array[4, :num] = requests.top_p
        array[5, :num] = requests.temperature.view(np.int64)
        array[6, :num] = requests.log_min_p.view(np.int64)
        array[7:, :num] = spread(requests.token_ids, self.shape.num_tokens, requests.lengths).T
        self.inputs.copy_(host, non_blocking=True)

    @torch.inference_mode()
    def run(self) -> Computed:
        """Everything from the inputs to the drawn tokens; no host sync, and no allocation that outlives it but the hidden states."""
        from l4core.engine.run.fixed_step_triton import unpack

        num_seqs, num_tokens = self.shape
        num_rows, outputs = num_seqs * num_tokens, self._outputs
        given = unpack(self.inputs, self._pending, num_tokens)
        step = StepRows(
            rows=given.rows,
            starts=given.starts,
            seq_lens=given.seq_lens,
            positions=given.positions,
            owner=self._owner,
        )
        phase = Phase(
            name="decode" if num_tokens == 1 else "verify",
            first=0,
            last=num_seqs,
            begin=0,
            end=num_rows,
            cu_seqlens_q=self._cu_seqlens,
            max_seqlen_q=num_tokens,
            max_seqlen_k=self._max_context,
        )
        forward = self._planner.plan(given.token_ids, step, [phase], self._every_row, longest=None)
        aux = None if outputs.aux is None else outputs.aux[:num_rows]
        hidden = self._model(forward, self._planner.memory, self._planner.backend, aux)
        logits = self._model.head(hidden, out=outputs.logits[:num_rows])
        drawn = self._draw(logits, given)
        rows = None if aux is None else AuxRows(values=aux, num_tokens=num_tokens)
        return Computed(hidden=hidden, aux=rows, logits=logits, drawn=drawn)

    def _draw(self, logits: torch.Tensor, given: Unpacked) -> torch.Tensor:
        """By the law, with top-p and min-p where this rank has all logits of a row (else the runner gathers them for the rows that want it)."""
        from l4core.sampling.draw_shards import draw_over_ranks
        from l4core.sampling.draw_triton import draw_rows

        is_decode, ranks = self.shape.num_tokens == 1, self._model.ranks
        out = self._outputs.drawn(len(logits))
        last_tokens, rows = (self._pending[0], self.inputs[0]) if is_decode else (None, None)
        law = (logits, given.temperature, given.seeds, given.draw_positions)
        if ranks.size > 1:
            return draw_over_ranks(*law, self._model.first_id, ranks, out, last_tokens, rows)
        return draw_rows(*law, given.top_p, given.log_min_p, out=out, last_tokens=last_tokens, rows=rows)
