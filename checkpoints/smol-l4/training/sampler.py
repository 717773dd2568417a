"""Writes dialogs with the teacher or the student. Every row writes one dialog after the other: the prompt's ids are forced, then tokens are
drawn until the end of the turn, then the next turn's header is forced, and so on; a finished row starts anew from another prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from l4core.demo.arch import BASE_VOCAB, EOT, HEADER_END, HEADER_START, IM_END, IM_START, VOCAB
from training.arrays import Tokens
from training.decoder import Decoder
from training.device import log
from training.dialogs import Pairs
from training.prompts import NEWLINE
from training.schedule import Clock

FIRST_TEXT_TOKEN = 17  # the ids before it are the base's own special tokens
MIN_P = 0.02
IntArray = npt.NDArray[np.int32]
FINAL, RESET = 17, 18  # bits of the packed output above a 17-bit token id


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a model writes turns. end: id that closes one.  headers: ids that open the user's and the assistant's turn.  forbidden: never drawn."""

    end: int
    headers: tuple[list[int], list[int]]
    forbidden: list[int]


def teacher_dialect(pairs: Pairs) -> Dialect:
    def header(role: list[int]) -> list[int]:
        return [NEWLINE, IM_START, *role, NEWLINE]

    forbidden = [i for i in range(FIRST_TEXT_TOKEN) if i != IM_END]
    return Dialect(end=IM_END, headers=(header(pairs.user), header(pairs.assistant)), forbidden=forbidden)


def student_dialect(pairs: Pairs) -> Dialect:
    def header(role: list[int]) -> list[int]:
        return [HEADER_START, *role, HEADER_END, NEWLINE, NEWLINE]

    forbidden = [i for i in (*range(FIRST_TEXT_TOKEN), *range(BASE_VOCAB, VOCAB)) if i != EOT]
    return Dialect(end=EOT, headers=(header(pairs.user), header(pairs.assistant)), forbidden=forbidden)


class Sampler:
    """prompts: ids; roles: whose turn each goes on with (1 = assistant).  temperature: cycled over the rows.  turns: at most so many answers a
    dialog.  once: row i answers prompt i and stops counting after its first dialog."""

    def __init__(
        self,
        decoder: Decoder,
        dialect: Dialect,
        prompts: Sequence[Sequence[int] | Tokens],
        roles: Sequence[int],
        *,
        temperature: Sequence[float],
        turns: int,
        seed: int,
        once: bool,
    ) -> None:
        device, rows = decoder.k.device, decoder.rows
        torch.manual_seed(seed)
        self._decoder, self._end, self._turns, self._once = decoder, dialect.end, turns, once
        self._prompt, self._prompt_len = _padded(prompts, device)
        self._prompt_role = torch.tensor(list(roles), device=device)
        self._header, self._header_len = _padded(dialect.headers, device)
        self._mask = torch.zeros(decoder.weights.head.shape[0], device=device)
        self._mask[dialect.forbidden] = float("-inf")
        cycle = torch.tensor(list(temperature), device=device).repeat(-(-rows // len(temperature)))
        self._temperature = cycle[:rows, None]
        self._pid = torch.arange(rows, device=device) if once else torch.randint(len(prompts), (rows,), device=device)
        self._token = self._prompt[self._pid, 0]
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._role = self._prompt_role[self._pid]
        self._todo = torch.zeros_like(self._position)  # header tokens still to be forced
        self._left = torch.randint(1, turns + 1, (rows,), device=device)  # answers still to be written
        self._first = self._pid.clone()

    @torch.no_grad()
    def run(self, clock: Clock) -> list[Tokens]:
        """Dialogs that were finished, or cut at the decoder's length, before the clock was over."""
        outs, pids = [], []
        while not clock.over():
            outs.append(self._step().int())
            pids.append(self._pid.int())
            clock.tick()
        packed, prompt_of = torch.stack(outs).cpu().numpy(), torch.stack(pids).cpu().numpy()
        dialogs = self._cut(packed, prompt_of)
        rate = packed.size / clock.seconds()
        log(len(outs), "steps,", len(dialogs), "dialogs,", sum(map(len, dialogs)), f"tokens, {rate:.0f} tokens/s")
        return dialogs

    def _step(self) -> torch.Tensor:
        """Advance every row by one token → token id with the FINAL and RESET bits [rows]."""
        position = self._position + 1
        in_prompt = position < self._prompt_len[self._pid]
        forced = (self._todo > 0) & ~in_prompt
        token = torch.where(forced, self._header_token(), self._draw())
        token = torch.where(in_prompt, self._prompt[self._pid, position.clamp(max=self._prompt.shape[1] - 1)], token)
        ended = ~in_prompt & ~forced & (token == self._end)
        left = self._left - (ended & (self._role == 1)).long()
        final = ended & (left <= 0)
        reset = final | (position >= self._decoder.length - 1)
        self._next_turn(ended & ~final, self._todo - forced.long())
        self._left, self._position, self._token = left, position, token
        self._restart(reset)
        return token + (final.long() << FINAL) + (reset.long() << RESET)

    def _draw(self) -> torch.Tensor:
        """Gumbel draw among tokens of at least MIN_P of the best probability."""
        logits = self._decoder.logits(self._token, self._position) + self._mask
        gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
        enough = logits >= logits.amax(-1, keepdim=True) + self._temperature * math.log(MIN_P)
        return torch.where(enough, logits + self._temperature * gumbel, -torch.inf).argmax(-1)

    def _header_token(self) -> torch.Tensor:
        column = (self._header_len[self._role] - self._todo).clamp(0, self._header.shape[1] - 1)
        return self._header[self._role, column]

    def _next_turn(self, turned: torch.Tensor, todo: torch.Tensor) -> None:
        self._role = torch.where(turned, 1 - self._role, self._role)
        self._todo = torch.where(turned, self._header_len[self._role], todo)

    def _restart(self, reset: torch.Tensor) -> None:
        """Rows in `reset` begin another prompt."""
        pid = torch.where(reset, torch.randint_like(self._pid, self._prompt.shape[0]), self._pid)
        self._pid = pid
        self._token = torch.where(reset, self._prompt[pid, 0], self._token)
        self._position = torch.where(reset, 0, self._position)
        self._role = torch.where(reset, self._prompt_role[pid], self._role)
        self._todo = torch.where(reset, 0, self._todo)
        self._left = torch.where(reset, torch.randint_like(self._left, 1, self._turns + 1), self._left)

    def _cut(self, packed: IntArray, prompt_of: IntArray) -> list[Tokens]:
        start, first, dialogs = self._prompt[:, 0].cpu().numpy(), self._first.cpu().numpy(), []
        for row in range(packed.shape[1]):
            cuts, last, pid = np.flatnonzero(packed[:, row] >> RESET & 1), 0, first[row]
            for cut in cuts[:1] if self._once else cuts:
                tokens = packed[last : cut + 1, row] & ((1 << FINAL) - 1)
                dialogs.append(np.concatenate([[start[pid]], tokens]).astype(np.uint16))
                last, pid = cut + 1, prompt_of[cut, row]
        return dialogs


def _padded(lists: Sequence[Sequence[int] | Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (ids padded with 0 to the longest, lengths)."""
    longest = max(map(len, lists))
    rows = [[*map(int, ids), *[0] * (longest - len(ids))] for ids in lists]
    return torch.tensor(rows, device=device), torch.tensor([len(ids) for ids in lists], device=device)
