"""Trains the EAGLE3 draft by training-time test on the student's outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from l4core.demo.arch import (
    BASE_VOCAB,
    BOT,
    CONTEXT,
    EOT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    PAD,
    STUDENT,
    VOCAB,
)
from l4core.demo.base import BaseModel
from l4core.demo.delta import load_delta
from l4core.demo.draft import store_draft
from l4core.demo.merge import Weights
from l4core.demo.tokenizer import make_tokenizer
from training.acceptance import Rows, acceptance, concatenate, next_embeddings, target_outputs
from training.device import device_and_dtype, log
from training.dialogs import Pairs
from training.draft_data import read_rows, split_held_out
from training.draft_model import AUX_LAYERS, DRAFT_FF, draft_loss, init_draft, unroll
from training.schedule import Clock, set_rates
from training.weights import read_base, split_base, student_weights

STEP_WEIGHT = 0.8  # of each further unrolled step


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions:
    """student_dialogs, test_dialogs: written by the student; dialogs: by the teacher.  unroll: steps of training-time test.  length: tokens of a
    row, batch: rows.  Without test_dialogs the held-out 2 % of the first file are tested on."""

    gguf: Path
    delta: Path
    out: Path
    student_dialogs: tuple[Path, ...] = ()
    dialogs: tuple[Path, ...] = ()
    test_dialogs: tuple[Path, ...] = ()
    test: int = 300
    length: int = 512
    batch: int = 64
    unroll: int = 5
    lr: float = 1.5e-3
    seconds: float = 165
    steps: int = 0
    every: int = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """keep [8192]: target id of each draft id, ascending.  in_draft [49216]: whether a target id is among them."""

    keep: torch.Tensor
    in_draft: torch.Tensor


def train_draft(options: DraftOptions) -> None:
    clock = Clock(options.seconds, options.steps)
    device, dtype = device_and_dtype()
    base = BaseModel(options.gguf)
    train, test = _read(options, Pairs(make_tokenizer(base, llama4=False)))
    with torch.no_grad():
        split = split_base(base, read_base(base, LAYERS), device)
        delta = {name: tensor.to(device) for name, tensor in load_delta(options.delta).items()}
        weights = student_weights(split, delta, dtype)
    counts = token_counts(train)
    start, keep = init_draft(weights, counts)
    log(
        len(train),
        "rows; draft vocabulary covers",
        f"{counts[keep.numpy()].sum() / counts.sum():.4f}",
        "of answer tokens",
    )
    in_draft = torch.zeros(VOCAB, dtype=torch.bool, device=device)
    vocabulary = Vocabulary(keep=keep.to(device), in_draft=in_draft.index_fill(0, keep.to(device), True))
    params = {name: tensor.to(device).requires_grad_(True) for name, tensor in start.items()}
    history = _train(params, weights, vocabulary, train, options, clock, dtype)
    trained = {name: tensor.detach().to(dtype) for name, tensor in params.items()}
    result = acceptance(trained, vocabulary.keep, weights, STUDENT, test)
    log("acceptance length", round(result.length, 4), "reached", result.reached, "steps", result.steps)
    note = {
        "steps": clock.steps,
        "seconds": round(clock.seconds()),
        "history": history,
        "acceptance_length": result.length,
        "accepted": result.reached,
        "verification_steps": result.steps,
        "held_out_dialogs": len(test),
    }
    save_draft(options.out, params, keep, note)


def _read(options: DraftOptions, pairs: Pairs) -> tuple[Rows, Rows]:
    """→ (training rows, test rows)."""
    parts = read_rows(options.student_dialogs, pairs, options.length, llama4=True)
    parts += read_rows(options.dialogs, pairs, options.length, llama4=False)
    train, test = split_held_out(parts)
    if options.test_dialogs:
        test = concatenate(read_rows(options.test_dialogs, pairs, options.length, llama4=True))
    return train, test[slice(None, options.test)]


def token_counts(rows: Rows) -> npt.NDArray[np.float64]:
    """How often each token occurs in answers, other text a thousandth; of the new tokens only <|eot|>, which always comes first."""
    counts = np.bincount(rows.ids[rows.answer > 0], minlength=VOCAB).astype(np.float64)
    counts += 1e-3 * np.bincount(rows.ids.reshape(-1), minlength=VOCAB)
    counts[[i for i in range(BASE_VOCAB, VOCAB) if i != EOT]] = 0
    counts[EOT] = counts.max() + 1
    return counts


def _train(
    params: Mapping[str, torch.Tensor],
    weights: Weights,
    vocabulary: Vocabulary,
    rows: Rows,
    options: DraftOptions,
    clock: Clock,
    dtype: torch.dtype,
) -> list[list[float]]:
    """→ history: step, seconds, loss, agreement at each depth."""
    optimizer = torch.optim.AdamW(params.values(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    rng, order = np.random.default_rng(1), list[int]()
    history: list[list[float]] = []
    recent: list[torch.Tensor] = []
    while not clock.over():
        if len(order) < options.batch:
            order = rng.permutation(len(rows)).tolist()
        pick, order = order[-options.batch :], order[: -options.batch]
        set_rates(optimizer, clock.rate(warmup=50, tail=0.7))
        ids, answer = (torch.from_numpy(a[pick]).to(weights.head.device) for a in (rows.ids, rows.answer))
        draft = {name: tensor.to(dtype) for name, tensor in params.items()}
        loss, hits = unrolled_loss(draft, weights, vocabulary, ids, answer > 0, options.unroll)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(torch.stack([loss.detach(), *hits]))
        clock.tick()
        if clock.steps <= 3 or clock.steps % options.every == 0:
            means = torch.stack(recent).mean(0).tolist()
            recent = []
            history.append([clock.steps, round(clock.seconds(), 1), *(round(m, 4) for m in means)])
            log(f"step {clock.steps} loss {means[0]:.4f} agreement by depth", [round(m, 3) for m in means[1:]])
    return history


def unrolled_loss(
    draft: Mapping[str, torch.Tensor],
    weights: Weights,
    vocabulary: Vocabulary,
    ids: torch.Tensor,
    answer: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """ids [B, L], answer [B, L] → (Σ 0.8^s · loss of step s, agreement of each step).

    The guess of step s at position i is judged by the target's distribution at position i + 1 + s: both speak of token i + 2 + s.
    """
    length = ids.shape[1]
    with torch.no_grad():
        hidden, aux = target_outputs(weights, STUDENT, ids)
        full = (hidden @ weights.head.T).float()
        wanted = F.pad(full[..., vocabulary.keep].softmax(-1).to(hidden.dtype), (0, 0, 0, steps + 1))
        best = F.pad(full.argmax(-1), (0, steps + 1))
        embeds = next_embeddings(weights, ids, steps + 1)
    mask = F.pad(answer, (0, steps + 2))
    losses, hits = [], []
    for step, guess in enumerate(unroll(draft, aux, embeds, steps)):
        at, token = slice(1 + step, 1 + step + length), slice(2 + step, 2 + step + length)
        loss, hit = draft_loss(
            guess, draft, wanted[:, at], best[:, at], vocabulary.keep, vocabulary.in_draft, mask[:, token]
        )
        losses.append(loss * STEP_WEIGHT**step)
        hits.append(hit)
    return torch.stack(losses).sum(), hits


def save_draft(folder: Path, params: Mapping[str, torch.Tensor], keep: torch.Tensor, note: Mapping[str, Any]) -> None:
    """The two tensor files and the config that `l4 demo-model --draft-out` joins, and draft-training.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.bfloat16) for name, t in params.items()}
    tensors["d2t"] = keep - torch.arange(len(keep))
    tensors["t2d"] = draft_mask(tensors["d2t"])
    store_draft(tensors, json.dumps(draft_config(len(keep)), indent=1), folder)
    (folder / "draft-training.json").write_text(json.dumps(note), encoding="utf-8")


def draft_mask(d2t: torch.Tensor) -> torch.Tensor:
    """Offsets d2t, int64 [draft vocabulary] → t2d, bool [49216]: whether a target id is among the draft's."""
    return torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, d2t + torch.arange(len(d2t)), True)


def keep_draft(draft: Path, out: Path) -> None:
    """A draft that examples/eagle3_train wrote into the demo's files: the folder `out` must be there."""
    from safetensors.torch import load_file

    tensors = load_file(draft / "model.safetensors")
    store_draft(
        {**tensors, "t2d": draft_mask(tensors["d2t"])}, (draft / "config.json").read_text(encoding="utf-8"), out
    )


def draft_config(vocabulary: int) -> dict[str, Any]:
    """config.json in the layout of SGLang's and NVIDIA's EAGLE3 drafts."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": DRAFT_FF,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": STUDENT.theta,
        "rope_scaling": None,
        "max_position_embeddings": CONTEXT,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": VOCAB,
        "draft_vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": BOT,
        "eos_token_id": EOT,
        "pad_token_id": PAD,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS),
            "use_aux_hidden_state": True,
            "norm_before_fc": False,
            "norm_before_residual": False,
            "aux_layer_id_convention": "output of layer i, 0-based",
        },
    }
