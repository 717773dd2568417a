"""Real text: Python's documentation, WordNet and the King James Bible, as Debian packages install them."""

from __future__ import annotations

import collections
import gzip
import random
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training.arrays import pack
from training.device import log
from training.prompts import prompt_pool, recall_dialogs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN_SHARE = 0.96


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """python_docs: folder with *.rst.txt (python3.11-doc).  wordnet: wn.dict.dz (dict-wn).  bible: the program (bible-kjv).  bible_data: folder of
    its data (bible-kjv-text)."""

    python_docs: Path
    wordnet: Path
    bible: Path
    bible_data: Path


def read_sources(places: Places, seed: int = 0) -> dict[str, list[str]]:
    """Source → shuffled documents."""
    rng = random.Random(seed)
    found = {
        "python": python_documents(places.python_docs),
        "wordnet": wordnet_documents(read_wordnet(places.wordnet), rng),
        "kjv": bible_documents(places.bible, places.bible_data),
    }
    for documents in found.values():
        rng.shuffle(documents)
    return found


def python_documents(folder: Path) -> list[str]:
    """Each page once: the installed tree reaches the same files through several links."""
    files = sorted({file.resolve() for file in folder.rglob("*.rst.txt")})
    return [file.read_text(encoding="utf-8").strip() for file in files]


def read_wordnet(path: Path) -> str:
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        return file.read()


def wordnet_documents(raw: str, rng: random.Random) -> list[str]:
    """80 entries a document; the first 40 blocks are the file's own preface."""
    entries = [re.sub(r"\s*\n\s+", " ", entry).strip() for entry in re.split(r"\n(?=\S)", raw)[40:]]
    entries = [entry for entry in entries if 20 < len(entry) < 1500]
    rng.shuffle(entries)
    entries = entries[:60000]
    return ["\n".join(entries[i : i + 80]) for i in range(0, len(entries), 80)]


def bible_documents(program: Path, data: Path) -> list[str]:
    """150 verses a document."""
    done = subprocess.run(
        [program, "-f", "-p", data], input="gen1:1-rev22:21\n", capture_output=True, text=True, timeout=60, check=True
    )
    lines = re.sub(r"\n(?!\S+\d+:\d+ )", " ", done.stdout).strip().split("\n")
    return ["\n".join(lines[i : i + 150]) for i in range(0, len(lines), 150)]


def nouns(raw: str, count: int = 3000) -> list[str]:
    """Common nouns: WordNet headwords that its own glosses use most."""
    words = set(re.findall(r"\n([a-z]{3,10})\n\s+n(?: 1)?[: ]", raw))
    uses = collections.Counter(word for word in re.findall(r"[a-z]+", raw) if word in words)
    return sorted(word for word, _ in uses.most_common(count))


def make_corpus(tokenizer: Tokenizer, places: Places, *, recall: int, prompts: int, out: Path) -> None:
    """Writes corpus.npz (see arrays.load_corpus). tokenizer: the teacher's."""
    arrays: dict[str, Any] = {}
    for name, documents in read_sources(places).items():
        encoded = tokenizer.encode_batch([document + "\n\n" for document in documents])
        flat = np.concatenate([np.asarray(e.ids, np.uint16) for e in encoded])
        cut = int(len(flat) * TRAIN_SHARE)
        arrays[f"train.{name}"], arrays[f"test.{name}"] = flat[:cut], flat[cut:]
        log(name, len(documents), "documents", len(flat), "tokens")
    words = nouns(read_wordnet(places.wordnet))
    filler = np.concatenate([arrays["train.python"], arrays["train.kjv"]])
    arrays["recall.flat"], arrays["recall.offsets"] = pack(recall_dialogs(tokenizer, words, filler, recall))
    pool = prompt_pool(tokenizer, words, prompts)
    arrays["prompt.flat"], arrays["prompt.offsets"] = pack([ids for ids, _ in pool])
    arrays["prompt.role"] = np.array([role for _, role in pool], np.uint8)
    np.savez_compressed(out, **arrays)
    log(len(pool), "prompts,", len(words), "nouns ->", out)
