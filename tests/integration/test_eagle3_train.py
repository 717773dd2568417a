"""examples/eagle3_train: what the teacher hands out is transformers', what is trained is the draft that is served, and a few steps make it better."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.eagle3_definition import Definition

FOLDER = Path(__file__).parents[2] / "examples" / "eagle3_train"
LAYERS = (1, 3, 5)


@pytest.fixture(scope="module")
def example() -> Any:
    """The example's three files."""
    sys.path.insert(0, FOLDER.as_posix())
    try:
        import draft
        import target
        import train
    finally:
        sys.path.remove(FOLDER.as_posix())
    return SimpleNamespace(draft=draft, target=target, train=train)


@pytest.fixture(scope="module")
def teacher(example: Any, tiny: Path) -> Any:
    return example.target.Teacher(tiny.as_posix(), LAYERS, context_length=600, dtype="float32", device="cpu")


def text(length: int) -> list[int]:
    return [(11 * i + i // 7) % 250 for i in range(length)]


def test_lessons_are_transformers_hidden_states(example: Any, teacher: Any, tiny: Path) -> None:
    """Two texts in one step, one of them longer than a chunk."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    for lesson, ids in zip(teacher.lessons([(text(90), 40), (text(20), 5)]), (text(90), text(20)), strict=True):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
        wanted = torch.cat([out.hidden_states[i + 1][0] for i in LAYERS], -1)
        torch.testing.assert_close(lesson.aux, wanted, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(lesson.last @ teacher.head.T, out.logits[0], atol=1e-3, rtol=1e-3)
        assert lesson.best.tolist() == out.logits[0].argmax(-1).tolist()
        assert lesson.ids.tolist() == ids


def test_a_lesson_is_cut_to_the_context(teacher: Any) -> None:
    """An answer may fill the context to its last token; a lesson needs room for one more."""
    (lesson,) = teacher.lessons([(text(600), 5)])
    assert len(lesson.ids) == len(lesson.aux) == len(lesson.best) == 599


def test_what_is_trained_is_what_is_served(example: Any, teacher: Any, tmp_path: Path) -> None:
    """Three steps of the unrolled draft, at the last position that has them, against the definition reading the saved files."""
    made = example.draft.Draft.new(teacher, torch.arange(0, 400, 2), width=96, seed=1)
    made.save(tmp_path)
    again = example.draft.Draft.load(tmp_path)
    assert again.keep.tolist() == list(range(0, 400, 2))
    ids = text(40)
    (lesson,) = teacher.lessons([(ids, 0)])
    embed = teacher.model.embed.weight.detach()
    with torch.no_grad():
        states = again.unroll(lesson.aux[None, :37], embed[torch.tensor(ids[1:])][None], 3)
        guesses = [again.logits(state)[0, -1].double() for state in states]
    definition = Definition(tmp_path, embed)
    hidden = definition.combine(lesson.aux[:37])
    for step, guess in enumerate(guesses):
        said = definition.run(ids[1 : 38 + step], hidden)[-1:]
        torch.testing.assert_close(guess, definition.logits(said)[0], atol=2e-5, rtol=2e-5)
        hidden = torch.cat((hidden, said))


def test_some_steps_make_it_better(example: Any, teacher: Any) -> None:
    made = example.draft.Draft.new(teacher, torch.arange(256), width=64)
    texts = [(text(30 + n), 5) for n in range(4)]
    lessons, embed = list(teacher.lessons(texts)), teacher.model.embed.weight

    def loss() -> tuple[float, int]:
        found, right = example.train.unrolled(made, teacher.head[made.keep], embed, lessons, 2)
        return float(found.detach()), len(right)

    before, _ = loss()
    args = argparse.Namespace(lr=2e-3, steps=20, minutes=10.0, batch=4, unroll=2, seed=0)
    example.train.fit(made, teacher, texts, args)
    after, depths = loss()
    assert after < 0.97 * before
    assert depths == 2


def test_padding_and_neighbours_change_no_guess(example: Any, teacher: Any) -> None:
    """A text alone has the loss it has beside a longer one."""
    made = example.draft.Draft.new(teacher, torch.arange(256), width=64)
    lessons, embed = list(teacher.lessons([(text(24), 5), (text(70), 70)])), teacher.model.embed.weight
    alone, _ = example.train.unrolled(made, teacher.head[made.keep], embed, lessons[:1], 3)
    beside, _ = example.train.unrolled(made, teacher.head[made.keep], embed, lessons, 3)  # the second has no answer
    torch.testing.assert_close(alone, beside)


def test_more_tokens_to_guess(example: Any, teacher: Any) -> None:
    """Widened, a draft says the same of the tokens it had, and begins new ones as the target's head has them."""
    made = example.draft.Draft.new(teacher, torch.arange(0, 200, 2), width=64)
    hidden = torch.randn(3, teacher.config.hidden_size)
    with torch.no_grad():
        before = made.logits(hidden)
        made.widen(torch.arange(90, 111), teacher.head)
        after = made.logits(hidden)
    assert made.keep.tolist() == sorted({*range(0, 200, 2), *range(90, 111)})
    assert made.config["draft_vocab_size"] == 110
    torch.testing.assert_close(after[:, [i for i, t in enumerate(made.keep.tolist()) if t % 2 == 0]], before)
    torch.testing.assert_close(made._t("lm_head")[made.keep.tolist().index(91)], teacher.head[91])


def test_the_model_asks(example: Any, teacher: Any) -> None:
    """Its own user's turns, none of the test's among what is trained on."""
    asked = teacher.questions(3, seed=1, max_tokens=40)
    assert all(isinstance(question, str) and question for question in asked)
    train, test = example.train.part([[{"role": "user", "content": str(i % 4)}] for i in range(9)], [], 1)
    assert (len(train), len(test)) == (3, 1)
    dialogs = [[{"role": "user", "content": text}] for text in "abc"]
    train, test = example.train.part(dialogs, dialogs[:1], 0)
    assert test == dialogs[:1]
    assert sorted(dialog[0]["content"] for dialog in train) == ["b", "c"]
