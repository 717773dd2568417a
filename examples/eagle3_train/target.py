"""The model that is served, as a teacher: it writes answers, and hands out what its layers computed for any text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from l4core import LLM, SamplingParams
from l4core.engine.batch import Inbox
from l4core.request import Request

PIECE = 2048
"""Tokens of one request at most; longer texts are cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One text. ids: int64 [L].  answer: bool [L], tokens the model wrote itself.  aux: [L, 3 · H], outputs of the three layers the draft reads.
    last: [L, H], the residual stream after the last layer."""

    ids: torch.Tensor
    answer: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor


class Teacher:
    """An engine whose layers are read while it computes, by the same door through which EAGLE3 reads them."""

    reads_target = True

    def __init__(self, model: str, layers: Sequence[int] | None, **options: Any) -> None:
        """layers: whose outputs the draft shall read, counted from 0; None = 1, n/2 − 1, n − 4."""
        self.num_drafts = self.max_drafts = self.num_guesses = self.num_slots = 0
        self.llm = LLM(
            model,
            disable_radix_cache=True,
            disable_cuda_graph=True,
            disable_overlap_schedule=True,
            progress=False,
            **options,
        )
        built = self.llm._built
        self.config, self.model, self.engine = built.model_config, built.engine.runner.model, built.engine
        n = self.config.num_layers
        self.layers = tuple(layers or (1, n // 2 - 1, n - 4))
        self._seen: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def answers(
        self, prompts: Sequence[str], *, temperature: float, max_tokens: int, seed: int
    ) -> list[tuple[list[int], int]]:
        """Chat answers → (all token ids, how many of them are the prompt)."""
        messages: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
        params = [
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed + i) for i in range(len(prompts))
        ]
        outputs = self.llm.chat(messages, params)
        return [([*o.prompt_token_ids, *o.outputs[0].token_ids], len(o.prompt_token_ids)) for o in outputs]

    def lessons(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[Lesson]:
        """texts: (token ids, where the answer begins). One forward pass over each."""
        self.model.aux_layers = (*self.layers, self.config.num_layers - 1)
        self.engine.speculation = self
        requests = [
            Request(
                request_id=f"lesson {i}",
                prompt_token_ids=list(ids[:PIECE]),
                params=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
                eos_token_ids=(),
                max_total_tokens=min(len(ids), PIECE) + 1,
            )
            for i, (ids, _) in enumerate(texts)
        ]
        inbox = Inbox(requests=requests)
        while inbox.requests or self.engine.has_work:
            self.engine.step(inbox)
            inbox = Inbox()
        self.engine.speculation, self.model.aux_layers = None, ()
        return [self._lesson(request, begin) for request, (_, begin) in zip(requests, texts, strict=True)]

    def logits(self, last: torch.Tensor) -> torch.Tensor:
        """last [R, H] → float32 [R, V]."""
        with torch.inference_mode():
            return self.model.logits(self.model.norm(last.clone())).float()

    def _lesson(self, request: Request, begin: int) -> Lesson:
        pieces = [aux for _, aux in sorted(self._seen.pop(request.request_id), key=lambda piece: piece[0])]
        whole, size = torch.cat(pieces), self.config.hidden_size
        ids = torch.tensor(request.prompt_token_ids)
        return Lesson(
            ids=ids, answer=torch.arange(len(ids)) >= begin, aux=whole[:, :-size].clone(), last=whole[:, -size:].clone()
        )

    # --- what the engine asks of a drafter ------------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Any]) -> dict[str, Any]:
        return {}

    def observe(self, batch: Any, aux: torch.Tensor, verified: Sequence[Any]) -> None:
        begin = 0
        for seq in batch.sequences:
            end = begin + len(seq.token_ids)
            self._seen.setdefault(seq.request.request_id, []).append((seq.start, aux[begin:end].clone()))
            begin = end

    def forget(self, request_ids: Sequence[str]) -> None:
        pass
