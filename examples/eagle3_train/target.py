"""The model that is served, as a teacher: it asks, it answers, and it hands out what its layers computed for any text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from l4core import LLM, SamplingParams
from l4core.engine.inbox import Inbox
from l4core.request import Request

PIECE = 2048
"""Tokens of one text at most; longer ones are cut."""
ROWS = 4096
"""Positions whose logits over the whole vocabulary are held at once."""
Text = tuple[list[int], int]
"""Token ids, and where the answer begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One text, on the teacher's device, in its dtype. ids: int64 [L].  answer: bool [L], tokens the model wrote itself.  aux: [L, 3 · H], outputs of
    the three layers the draft reads.  last: [L, H], what the head reads.  best: int64 [L], the likeliest next token."""

    ids: torch.Tensor
    answer: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor
    best: torch.Tensor


class Teacher:
    """An engine whose layers are read while it computes, by the same door through which EAGLE3 reads them."""

    reads_target = True

    def __init__(self, model: str, layers: Sequence[int] | None, **options: Any) -> None:
        """layers: whose outputs the draft shall read, counted from 0; None = 1, n/2 − 1, n − 4.  options: as LLM takes them."""
        self.num_drafts = self.max_drafts = self.num_guesses = self.num_slots = 0
        self.llm = LLM(model, progress=False, **options)
        built = self.llm._built
        self.config, self.model, self.engine = built.model_config, built.engine.runner.model, built.engine
        n = self.config.num_layers
        self.layers = tuple(layers or (1, n // 2 - 1, n - 4))
        self._seen: dict[str, list[tuple[int, torch.Tensor]]] = {}

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def head(self) -> torch.Tensor:
        """[V, H]."""
        weight = (self.model.embed if self.config.tie_word_embeddings else self.model.lm_head).weight
        return weight.to_dense() if weight.is_mkldnn else weight

    def questions(self, count: int, *, seed: int, max_tokens: int = 96) -> list[str]:
        """The model goes on with a user's turn that has just begun; a chat model writes what it was trained to be asked."""
        a, b = (self.llm._frontend.chat_ids([{"role": "user", "content": text}]) for text in "ab")
        opening = a[: next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)]
        params = [
            SamplingParams(temperature=1.0, min_p=0.02, max_tokens=max_tokens, seed=seed + i) for i in range(count)
        ]
        found = (o.outputs[0] for o in self.llm.generate([opening] * count, params, use_tqdm=False))
        return [text for o in found if o.finish_reason == "stop" and (text := o.text.strip())]

    def answers(self, dialogs: Sequence[Any], *, temperature: float, max_tokens: int | None, seed: int) -> list[Text]:
        """dialogs: lists of messages. max_tokens: of an answer; None = until the context is full."""
        params = [
            SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed + i) for i in range(len(dialogs))
        ]
        outputs = self.llm.chat(dialogs, params, use_tqdm=False)
        return [([*o.prompt_token_ids, *o.outputs[0].token_ids], len(o.prompt_token_ids)) for o in outputs]

    def lessons(self, texts: Sequence[Text]) -> Iterator[Lesson]:
        """One forward pass over each, in order."""
        self.model.aux_layers = (*self.layers, self.config.num_layers - 1)
        self.engine.speculation, self.engine.runner.graphs, graphs = self, None, self.engine.runner.graphs
        longest = min(PIECE, self.llm.context_length - 1)
        requests = [
            Request(
                request_id=f"lesson {i}",
                prompt_token_ids=list(ids[:longest]),
                params=SamplingParams(max_tokens=1, temperature=0.0, seed=0),
                eos_token_ids=(),
                max_total_tokens=min(len(ids), longest) + 1,
                cache_salt=f"lesson {i}",  # a prefix found in the cache would not be computed
            )
            for i, (ids, _) in enumerate(texts)
        ]
        inbox = Inbox(requests=requests, flush_cache=True)
        while inbox.requests or self.engine.has_work:
            self.engine.step(inbox)
            inbox = Inbox()
        self.engine.speculation, self.model.aux_layers, self.engine.runner.graphs = None, (), graphs
        for request, (_, begin) in zip(requests, texts, strict=True):
            yield self._lesson(request, begin)

    @torch.no_grad()
    def _lesson(self, request: Request, begin: int) -> Lesson:
        pieces = [aux for _, aux in sorted(self._seen.pop(request.request_id), key=lambda piece: piece[0])]
        whole, size = torch.cat(pieces), self.config.hidden_size
        last = self.model.norm(whole[:, -size:].clone())
        best = [self.model.logits(part).argmax(-1) for part in last.split(ROWS)]
        ids = torch.tensor(request.prompt_token_ids, device=self.device)
        answer = torch.arange(len(ids), device=self.device) >= begin
        return Lesson(ids=ids, answer=answer, aux=whole[:, :-size].clone(), last=last, best=torch.cat(best))

    # --- what the engine asks of a drafter ------------------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Any], *, late: bool = False) -> dict[str, Any]:
        return {}

    def observe(self, batch: Any, aux: Any, verified: Sequence[Any]) -> None:
        begin = 0
        for seq in batch.sequences:
            end = begin + len(seq.token_ids)
            self._seen.setdefault(seq.request.request_id, []).append((seq.start, aux.values[begin:end].clone()))
            begin = end

    def forget(self, request_ids: Sequence[str]) -> None:
        pass
