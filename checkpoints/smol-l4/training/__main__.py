"""`python -m training corpus | generate | heal | evaluate | draft | keep`, in this order; see README.md. Long steps stop by the clock (--seconds)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from l4core.demo.base import BaseModel
from l4core.demo.tokenizer import make_tokenizer
from training.draft import DraftOptions, keep_draft, train_draft
from training.evaluate import PARTS, EvaluateOptions, evaluate
from training.generate import GenerateOptions, generate
from training.heal import HealOptions, heal
from training.sources import Places, make_corpus

FILE = click.Path(path_type=Path)
F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"show_default": True})
def main() -> None:
    """How smol-l4 was made."""


def files(name: str, text: str, *, required: bool = False) -> Callable[[F], F]:
    return click.option(name, type=FILE, multiple=True, required=required, help=f"{text}; may be repeated")


def file(name: str, text: str, **more: Any) -> Callable[[F], F]:
    return click.option(name, type=FILE, help=text, **more)


GGUF = file("--gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", required=True)
CORPUS = file("--corpus", "from `corpus`", default="corpus.npz")


@main.command()
@GGUF
@file("--python-docs", "folder with .rst.txt sources (Debian python3.11-doc)", required=True)
@file("--wordnet", "wn.dict.dz (Debian dict-wn)", required=True)
@file("--bible", "the program `bible` (Debian bible-kjv)", required=True)
@file("--bible-data", "its data folder (Debian bible-kjv-text)", required=True)
@click.option("--recall", default=4000, help="recall dialogs")
@click.option("--prompts", default=40000, help="beginnings of dialogs")
@file("--out", "corpus file", default="corpus.npz")
def corpus(gguf: Path, recall: int, prompts: int, out: Path, **places: Path) -> None:
    """Tokenise real text, make prompt beginnings."""
    tokenizer = make_tokenizer(BaseModel(gguf), llama4=False)
    make_corpus(tokenizer, Places(**places), recall=recall, prompts=prompts, out=out)


@main.command("generate")
@GGUF
@CORPUS
@file("--delta", "sample from the student with this delta")
@file("--prompts-from", "take the first user turns of these dialogs as prompts")
@click.option("--part", type=click.Choice(["train", "test"]), default="train", help="test: the held-out 2 %, each once")
@click.option("--rows", default=1024, help="dialogs written side by side")
@click.option("--length", default=768, help="tokens of a dialog at most")
@click.option("--turns", default=2, help="answers of a dialog at most")
@click.option("--temperature", type=float, multiple=True, default=(0.8, 0.9, 1.0))
@click.option("--seconds", default=130.0)
@click.option("--seed", default=0)
@click.option("--show", default=8, help="samples printed")
@file("--out", "dialogs file", default="dialogs.npz")
def generate_command(**options: Any) -> None:
    """Sample dialogs from the teacher or the student."""
    generate(GenerateOptions(**options))


@main.command("heal")
@GGUF
@CORPUS
@files("--dialogs", "from `generate`", required=True)
@file("--resume", "start from this delta")
@click.option("--tokens", default=24576, help="student tokens a step")
@click.option("--slice", default=4096, help="positions per slice of the loss")
@click.option("--lr", default=4e-3)
@click.option("--balance", default=1.0, help="weight of the load-balance loss")
@click.option("--end-ce", default=0.2, help="weight of the cross-entropy on a closing <|eot|>")
@click.option("--seconds", default=360.0)
@click.option("--steps", default=0, help="0: by the clock")
@click.option("--every", default=20, help="steps between log lines")
@click.option("--seed", default=0)
@file("--out", "folder of the delta", required=True)
def heal_command(**options: Any) -> None:
    """Distil the teacher into the student."""
    heal(HealOptions(**options))


@main.command("evaluate")
@GGUF
@CORPUS
@file("--delta", "folder of the delta", required=True)
@files("--dialogs", "from `generate`", required=True)
@click.option("--part", "parts", type=click.Choice(list(PARTS)), multiple=True, default=tuple(PARTS))
@click.option(
    "--size", "sizes", type=int, multiple=True, default=(60, 300, 600, 1100, 1600), help="recall and copy distances"
)
@click.option("--docs", default=48, help="held-out pieces per source")
@click.option("--length", default=2048, help="tokens of a piece")
@click.option("--held", default=80, help="held-out dialogs")
@click.option("--long-docs", default=8)
@click.option("--cases", default=100, help="recall and copy cases per distance")
@click.option("--max-new", default=120, help="tokens of an answer")
@file("--out", "results", default="results.json")
def evaluate_command(**options: Any) -> None:
    """Measure for the model card."""
    evaluate(EvaluateOptions(**options))


@main.command("draft")
@GGUF
@file("--delta", "folder of the delta", required=True)
@files("--student-dialogs", "written by the student (generate --delta)")
@files("--dialogs", "written by the teacher")
@files("--test-dialogs", "written greedily by the student; default: the held-out 2 % of the first file")
@click.option("--test", default=300, help="test rows at most")
@click.option("--length", default=512, help="tokens of a row")
@click.option("--batch", default=64, help="rows a step")
@click.option("--unroll", default=5, help="steps of training-time test")
@click.option("--lr", default=1.5e-3)
@click.option("--seconds", default=165.0)
@click.option("--steps", default=0, help="0: by the clock")
@click.option("--every", default=50, help="steps between log lines")
@file("--out", "folder of the draft files", required=True)
def draft_command(**options: Any) -> None:
    """Train the EAGLE3 draft."""
    train_draft(DraftOptions(**options))


@main.command("keep")
@file("--draft", "folder that examples/eagle3_train wrote", required=True)
@file("--out", "folder of the draft files", required=True)
def keep_command(draft: Path, out: Path) -> None:
    """Keep a draft that was trained further as the demo's."""
    keep_draft(draft, out)


if __name__ == "__main__":
    main()
