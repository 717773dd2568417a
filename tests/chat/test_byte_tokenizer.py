from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from l4core.chat.byte_tokenizer import BOS, SMALLEST_VOCABULARY, build_byte_tokenizer
from l4core.chat.specials import LLAMA4_TOKENS
from l4core.chat.tokenizer import Tokenizer
from l4core.testing.models.tokenizers import make_byte_tokenizer


@pytest.mark.parametrize("vocab_size", [SMALLEST_VOCABULARY, 300, 512, 4096])
def test_the_vocabulary_has_exactly_the_size_asked_for(tmp_path: Path, vocab_size: int) -> None:
    ids = make_byte_tokenizer(tmp_path, vocab_size)
    made = Tokenizer.from_folder(tmp_path)
    assert made.vocab_size == vocab_size
    assert ids == {token: made.special_id(token) for token in LLAMA4_TOKENS}
    assert sorted(ids.values()) == list(range(vocab_size - len(LLAMA4_TOKENS), vocab_size))
    assert all(made.token(i) is not None for i in range(vocab_size))
    assert made.bos_id == ids[BOS]


def test_a_vocabulary_smaller_than_bytes_and_specials_is_refused() -> None:
    with pytest.raises(ValueError, match=f"wanted at least {SMALLEST_VOCABULARY}"):
        build_byte_tokenizer(SMALLEST_VOCABULARY - 1)


def test_it_merges_common_words(tokenizer: Tokenizer) -> None:
    text = "The capital of France is Paris."
    assert len(tokenizer.encode_text(text, allow_special=False)) < len(text) / 2


def test_the_same_arguments_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    make_byte_tokenizer(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_transformers_reads_the_folder(folder: Path, hf: Any) -> None:
    ids = hf.encode("hello<|eot|>")
    assert hf.decode(ids) == "<|begin_of_text|>hello<|eot|>"
    assert (hf.bos_token, hf.eos_token, hf.pad_token) == (BOS, "<|eot|>", "<|finetune_right_pad|>")
    assert len(hf) == 512
