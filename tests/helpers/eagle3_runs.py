"""Engines with an EAGLE3 draft over a tiny model, whose guesses are noted, mixed with the true answers, and held to the draft's definition."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from helpers.eagle3_definition import Definition
from helpers.profile import FULL
from l4core import LLM, SamplingParams
from l4core.engine.batch import PENDING, Draft, DraftRequest
from l4core.request import RequestOutput

OPTIONS: Mapping[str, Any] = {
    "speculative_adaptive": "off",
    "dtype": "float32",
    "device": "cpu",
    "progress": False,
    "page_size": 16,
}
COUNT, TOKENS, STEPS, LONGEST = (60, 100, 3, 192) if FULL else (8, 50, 3, 140)


def target_of(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return loaded


def prompts() -> list[list[int]]:
    """Around the borders of the first chunks; some begin alike."""
    return [[(7 * i + i // 9) % 250 for i in range(4 + 13 * n % 80)] + [n % 250] for n in range(COUNT)]


def open_llm(folder: Path, draft: Path | None = None, *, relay: bool = False, **options: Any) -> LLM:
    """relay: as on a device that works beside the host; guesses stay on the device."""
    flags = (
        {} if draft is None else {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": draft.as_posix()}
    )
    llm = LLM(folder.as_posix(), **{**OPTIONS, **flags, **options})
    engine = llm._built.engine
    engine.scheduler.kv._on_empty = engine.runner.memory.poison
    engine.overlap, engine.scheduler.max_in_flight = relay, 1 + relay
    return llm


def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)


class Recorder:
    """Notes what the draft guessed for which tokens, and sends the true continuation instead of every guess that a coin picks."""

    def __init__(self, llm: LLM, plain: Sequence[RequestOutput], acceptance: float) -> None:
        self.guesses: list[tuple[tuple[int, ...], list[int]]] = []
        self._answers = {tuple(o.prompt_token_ids): o.outputs[0].token_ids for o in plain}
        self._acceptance = acceptance
        self._speculation: Any = llm._built.engine.speculation
        self._propose = self._speculation.propose
        self._speculation.propose = self.propose
        self.num_late = 0

    def propose(self, requests: Sequence[DraftRequest], *, late: bool = False) -> dict[str, Draft]:
        drafts = self._propose(requests, late=late)
        mixed = {}
        for wanted in requests:
            name, known = wanted.request.request_id, (*wanted.request.prompt_token_ids, *wanted.output_token_ids)
            if name not in drafts:
                continue
            guesses, is_late = list(drafts[name].token_ids), PENDING in drafts[name].token_ids
            if is_late:
                assert late
                table, column = self._speculation._late._ids.wait(), self._speculation._late._columns[name]
                guesses = table[: len(guesses), column].tolist()
            self.guesses.append((known, guesses))
            true = self._answers[tuple(wanted.request.prompt_token_ids)][len(wanted.output_token_ids) :]
            sent = [
                token if hash((known[-1], len(known), i)) % 100 < 100 * self._acceptance else guess
                for i, (guess, token) in enumerate(zip(guesses, true, strict=False))
            ]
            mixed[name] = drafts[name] if is_late else Draft(token_ids=sent)
            if is_late:  # on its way to the verification and to the host
                self.num_late += 1
                with torch.inference_mode():
                    table[: len(sent), column] = torch.tensor(sent)
                    self._speculation._state.pending[1 : len(sent) + 1, wanted.row] = torch.tensor(sent)
        return mixed


def check_guesses(recorder: Recorder, folder: Path, draft: Path, aux_layers: Sequence[int], plain: Any) -> int:
    """→ how many were compared."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    definition = Definition(draft, model.get_input_embeddings().weight.detach())
    aux: dict[tuple[int, ...], torch.Tensor] = {}
    for output in plain:
        ids = (*output.prompt_token_ids, *output.outputs[0].token_ids)
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        aux[ids] = torch.cat([layer_output(states, layer) for layer in aux_layers], -1)
    for known, guesses in recorder.guesses:
        whole = next(ids for ids in aux if ids[: len(known)] == known)
        assert definition.chain(known, aux[whole], len(guesses)) == guesses, f"after {len(known)} tokens"
    return len(recorder.guesses)


def layer_output(states: Sequence[torch.Tensor], layer: int) -> torch.Tensor:
    """transformers' last hidden state comes after the final norm, so the last layer cannot be read from it."""
    assert layer + 1 < len(states) - 1
    return states[layer + 1][0]
