"""The training scripts: they import, and their pure parts do what the model card says."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from l4core.demo import arch as a
from l4core.demo.merge import LayerWeights, Weights
from training import __main__ as commands
from training import (
    acceptance,
    batches,
    dialogs,
    draft,
    draft_data,
    draft_model,
    evaluate,
    forward,
    heal,
    prompts,
    sampler,
    schedule,
)
from training.arrays import pack, unpack
from training.decoder import Decoder
from training.sources import nouns, wordnet_documents


@dataclass(frozen=True)
class Encoding:
    ids: list[int]


class Letters:
    """One token a character, above the special ones."""

    def encode(self, text: str) -> Encoding:
        return Encoding([100 + ord(c) for c in text])

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i - 100) for i in ids)


TOKENIZER: Letters = Letters()


@pytest.fixture(scope="module")
def pairs() -> dialogs.Pairs:
    return dialogs.Pairs(TOKENIZER)  # type: ignore[arg-type]


def chatml(role: str, text: str, *, close: bool = True) -> list[int]:
    return prompts.chatml(TOKENIZER, role, text, close=close)  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text).ids


@pytest.fixture(scope="module")
def tiny_weights() -> Weights:
    """Random weights of the real widths, two layers of them (the second made a NoPE layer by its index in tests)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    layers = tuple(
        LayerWeights(
            attn_norm=torch.ones(a.HIDDEN),
            qkv=draw(a.Q_ROWS + 2 * a.KV_ROWS, a.HIDDEN),
            o=draw(a.HIDDEN, a.HIDDEN),
            mlp_norm=torch.ones(a.HIDDEN),
            router=draw(a.EXPERTS, a.HIDDEN),
            gate_up=draw(2 * a.SLOTS * a.EXPERT_FF, a.HIDDEN),
            down=draw(a.HIDDEN, a.SLOTS * a.EXPERT_FF),
        )
        for _ in range(4)
    )
    embed = draw(300, a.HIDDEN)
    return Weights(layers=layers, norm=torch.ones(a.HIDDEN), embed=embed, head=embed)


SMALL = replace(a.STUDENT, chunk=8, floor_scale=8)


def test_all_commands_have_help() -> None:
    runner = CliRunner()
    assert runner.invoke(commands.main, ["--help"]).exit_code == 0
    for name in ("corpus", "generate", "heal", "evaluate", "draft", "keep"):
        assert runner.invoke(commands.main, [name, "--help"]).exit_code == 0
    assert set(evaluate.PARTS) == {"text", "answers", "experts", "copy", "recall", "long", "dialogs"}


def test_decoding_equals_the_whole_forward_pass(tiny_weights: Weights) -> None:
    """Over two chunk borders, with a NoPE layer (index 3)."""
    tokens = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(1))
    whole = forward.forward(tiny_weights, tokens, [20], SMALL).hidden @ tiny_weights.head.T
    decoder = Decoder(tiny_weights, SMALL, rows=1, length=20, device=torch.device("cpu"), dtype=torch.float32)
    for position in range(20):
        logits = decoder.logits(tokens[position : position + 1], torch.tensor([position]))
        torch.testing.assert_close(logits[0], whole[position], atol=1e-4, rtol=1e-4)


def test_packed_documents_do_not_see_each_other(tiny_weights: Weights) -> None:
    tokens = torch.randint(0, 300, (30,), generator=torch.Generator().manual_seed(2))
    packed = forward.forward(tiny_weights, tokens, [11, 19], SMALL).hidden
    alone = forward.forward(tiny_weights, tokens[11:], [19], SMALL).hidden
    torch.testing.assert_close(packed[11:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change", [{"chunk": 0}, {"nope": False}, {"nope_chunked": True}, {"temperature": False}, {"router": "shift"}]
)
def test_each_feature_can_be_broken(tiny_weights: Weights, change: dict[str, object]) -> None:
    tokens = torch.arange(20)
    whole = forward.forward(tiny_weights, tokens, [20], SMALL).hidden
    broken = forward.forward(tiny_weights, tokens, [20], replace(SMALL, **change)).hidden  # type: ignore[arg-type]
    assert (whole - broken).abs().max() > 1e-3


def test_segments_end_at_documents_and_chunks() -> None:
    cut = forward.segments([5, 9], 4, torch.device("cpu"))
    assert cut.borders.tolist() == [0, 4, 5, 9, 13, 14]
    assert cut.longest == 4


def test_expert_scale() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    top = torch.sigmoid(torch.tensor(2.0)).item()
    assert forward.expert_scale(logits, "top1").tolist() == [[1.0, 0.0, pytest.approx(top), 0.0, 0.0]]
    assert forward.expert_scale(logits, "shift").tolist() == [[1.0, 0.0, 0.0, pytest.approx(top), 0.0]]
    assert forward.expert_scale(logits, "off").tolist() == [[1.0, 0.5, 0.0, 0.0, 0.0]]


def test_a_dialog_in_both_forms(pairs: dialogs.Pairs) -> None:
    stream = chatml("system", prompts.DEFAULT_SYSTEM) + chatml("user", "hi") + chatml("assistant", "yo")
    pair = pairs.dialog(stream)
    assert pair.teacher == stream
    header = [a.HEADER_START, *ids("user"), a.HEADER_END, 198, 198]
    assert pair.student[: 1 + len(header) + 3] == [a.BOT, *header, *ids("hi"), a.EOT]
    kinds = [dialogs.PROMPT] * 2 + [dialogs.END] + [dialogs.ANSWER] * 2 + [dialogs.END]
    assert pair.kind == kinds
    for teacher_at, student_at, kind in zip(pair.at_teacher, pair.at_student, pair.kind, strict=True):
        following = pair.teacher[teacher_at + 1], pair.student[student_at + 1]
        assert following == (a.IM_END, a.EOT) if kind == dialogs.END else following[0] == following[1]


def test_a_cut_dialog(pairs: dialogs.Pairs) -> None:
    messages, closed = dialogs.parse(chatml("user", "hi", close=False))
    assert (messages, closed) == ([(ids("user"), ids("hi"))], False)
    assert dialogs.parse([a.IM_START, *ids("us")]) == ([], True)


def test_openings_stop_before_the_first_answer(pairs: dialogs.Pairs) -> None:
    stream = np.array(chatml("user", "hi") + chatml("assistant", "yo"), np.uint16)
    start = chatml("user", "hi") + chatml("assistant", "", close=False)
    assert dialogs.openings([stream], pairs.assistant) == [tuple(start)]


def test_prompts_are_reproducible_and_of_three_kinds() -> None:
    pool = prompts.prompt_pool(TOKENIZER, ["cat", "dog"], 200)  # type: ignore[arg-type]
    assert pool == prompts.prompt_pool(TOKENIZER, ["cat", "dog"], 200)  # type: ignore[arg-type]
    share = sum(role for _, role in pool) / len(pool)
    assert 0.3 < share < 0.5


def test_recall_dialogs_answer_with_the_fact(pairs: dialogs.Pairs) -> None:
    text = np.array(ids("some text ") * 300, np.uint16)
    made = prompts.recall_dialogs(TOKENIZER, ["cat"], text, 3, low=50, high=60)  # type: ignore[arg-type]
    for dialog in made:
        messages, closed = dialogs.parse(dialog)
        assert closed
        answer = TOKENIZER.decode(messages[-1][1])
        assert answer.endswith("is cat.")
        assert TOKENIZER.decode(messages[1][1]).startswith(answer)


def test_batches_are_full_and_aligned(pairs: dialogs.Pairs) -> None:
    dialog = np.array(chatml("user", "hi " * 20) + chatml("assistant", "yo " * 20), np.uint16)
    text = np.arange(9000, dtype=np.uint16)
    source = batches.Batches(pairs, [dialog], [], {"python": text}, n=3000, teacher_tokens=3400, seed=1)
    batch = source.next()
    assert len(batch.student) == sum(batch.student_lengths) == 3000
    assert len(batch.teacher) == sum(batch.teacher_lengths) == 3400
    assert len(batch.at_student) == len(batch.kind) == len(batch.weight) == 3000
    used = int(batch.weight.sum())
    inside = (batch.kind[:used] != dialogs.END) & (batch.at_student[:used] < 2999) & (batch.at_teacher[:used] < 3399)
    following = batch.student[batch.at_student[:used][inside] + 1], batch.teacher[batch.at_teacher[:used][inside] + 1]
    assert (following[0] == following[1]).float().mean() > 0.99  # all but the last position of a text piece


def test_pack_and_unpack() -> None:
    flat, offsets = pack([[1, 2], [], [3]])
    assert [x.tolist() for x in unpack(flat, offsets)] == [[1, 2], [], [3]]


def test_kl_of_equal_models_is_zero_and_ends_are_moved() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator)
    teacher_head = torch.randn(a.BASE_VOCAB, 8, generator=generator)
    student_head = torch.full((a.VOCAB, 8), 0.0)
    student_head[: a.BASE_VOCAB] = teacher_head
    student_head[a.EOT], student_head[a.IM_END] = teacher_head[a.IM_END], 0.0
    bias = torch.zeros(a.VOCAB)
    bias[a.BASE_VOCAB :] = -1e9
    bias[a.EOT], bias[a.IM_END] = 0.0, -1e9
    extended = torch.cat([hidden, torch.ones(6, 1)], 1)
    _, kl, same = heal.aligned_kl(
        extended,
        hidden,
        torch.cat([student_head, bias[:, None]], 1),
        teacher_head,
        torch.ones(6),
        torch.zeros(6, dtype=torch.long),
        0.0,
    )
    assert kl.abs().max() < 1e-4
    assert same.all()


def test_balance_is_one_when_even() -> None:
    even = torch.eye(4).repeat(8, 1) * 1e-3
    loss, used = heal.balance_loss((even, even))
    assert loss.item() == pytest.approx(1.0, abs=1e-3)
    assert used.tolist() == [[0.25] * 4] * 2
    skewed, _ = heal.balance_loss((torch.tensor([[9.0, 0, 0, 0]] * 4),))
    assert skewed.item() > 3


def test_learning_rate_rises_and_falls() -> None:
    clock = schedule.Clock(seconds=1e9, limit=100)
    rates = []
    for _ in range(100):
        rates.append(clock.rate(warmup=10, tail=0.5))
        clock.tick()
    assert clock.over()
    assert rates[0] == pytest.approx(0.1)
    assert rates[20:50] == [1.0] * 30
    assert rates[-1] == pytest.approx(0.02)


def test_acceptance_walk() -> None:
    hits = [
        np.array([True, True, False, True, True, True, True, True]),
        np.array([True, False] * 4),
        np.array([False] * 8),
    ]
    # token 1 is known: its chain starts at state 0 and two guesses hold; then token 4 from state 3 (one guess), token 6 from state 5
    assert acceptance.walk((1, 7), hits) == [(2, 3), (1, 2), (1, 1)]


def test_answer_runs() -> None:
    rows = acceptance.Rows(
        ids=np.zeros((1, 8), np.int64), lengths=np.array([7]), answer=np.array([[1, 0, 1, 1, 0, 1, 0, 1]], np.uint8)
    )
    assert acceptance.answer_runs(rows, 0) == [(2, 3), (5, 5)]


def test_marks_of_both_forms_agree(pairs: dialogs.Pairs) -> None:
    stream = chatml("user", "hello there") + chatml("assistant", "yes, indeed") + chatml("user", "ok")
    tokens, marks = draft_data.mark_chatml(stream, pairs)
    same, only_answers = draft_data.mark_llama4(tokens, pairs.assistant)
    assert same == tokens
    assert [t for t, m in zip(tokens, only_answers, strict=True) if m] == [*ids("yes, indeed"), a.EOT]
    different = [t for t, m, n in zip(tokens, marks, only_answers, strict=True) if m != n]
    assert different == [a.EOT, a.EOT]  # the ends of the user's two turns


def test_the_drafts_first_step_needs_no_cache(tiny_weights: Weights) -> None:
    """Unrolled steps leave earlier ones as they are, and a position does not see later ones."""
    counts = np.arange(a.VOCAB, dtype=np.float64)
    big = replace(tiny_weights, head=torch.zeros(a.VOCAB, a.HIDDEN))
    made, keep = draft_model.init_draft(big, counts)
    assert keep.tolist() == list(range(a.VOCAB - draft_model.DRAFT_VOCAB, a.VOCAB))
    generator = torch.Generator().manual_seed(0)
    aux, embeds = torch.randn(1, 6, 3 * a.HIDDEN, generator=generator), torch.randn(1, 9, a.HIDDEN, generator=generator)
    long = list(draft_model.unroll(made, aux, embeds, 3))
    short = list(draft_model.unroll(made, aux[:, :4], embeds[:, :7], 3))
    for one, other in zip(long, short, strict=True):
        torch.testing.assert_close(one[:, :4], other, atol=1e-5, rtol=1e-4)


def test_draft_vocabulary_holds_the_end_and_no_other_new_token() -> None:
    rows = acceptance.Rows(
        ids=np.array([[500, 500, a.EOT, a.BOT]]), lengths=np.array([4]), answer=np.array([[1, 0, 1, 0]], np.uint8)
    )
    counts = draft.token_counts(rows)
    assert counts.argmax() == a.EOT
    assert counts[500] == pytest.approx(1.002)
    assert counts[a.BOT] == 0


def test_the_sampler_forces_prompts_and_headers(tiny_weights: Weights) -> None:
    """Every dialog starts with its prompt; after an end of turn comes the other role's header."""
    dialect = sampler.Dialect(end=7, headers=([50, 51], [60, 61, 62]), forbidden=[0, 1])
    start = [[100, 101, 102], [110, 111]]
    decoder = Decoder(tiny_weights, SMALL, rows=4, length=16, device=torch.device("cpu"), dtype=torch.float32)
    made = sampler.Sampler(decoder, dialect, start, [1, 1], temperature=[1.0], turns=2, seed=3, once=False)
    found = [d.tolist() for d in made.run(schedule.Clock(1e9, 40))]
    assert found
    for dialog in found:
        assert dialog[:3] == start[0] or dialog[:2] == start[1]
        assert not {0, 1} & set(dialog)
        for place, token in enumerate(dialog[:-3]):
            if token == 7 and place > 2:
                assert dialog[place + 1 : place + 3] == [50, 51] or dialog[place + 1 : place + 4] == [60, 61, 62]


def test_wordnet_text() -> None:
    preface = "\n".join(f"{i:02d} preface" for i in range(40))
    entry = "\n".join(["cat", "    n 1: an animal that a dog chases", "dog", "    n 1: an animal that a cat fears"])
    raw = f"{preface}\n{entry}\n"
    assert nouns(raw) == ["cat", "dog"]
    documents = wordnet_documents(raw, random.Random(0))
    assert sorted(documents[0].split("\n")) == [
        "cat n 1: an animal that a dog chases",
        "dog n 1: an animal that a cat fears",
    ]
