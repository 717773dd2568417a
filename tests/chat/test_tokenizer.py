from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from l4core.chat.byte_tokenizer import build_byte_tokenizer
from l4core.chat.tokenizer import Tokenizer
from l4core.errors import CheckpointError, RequestError
from l4core.plugin_api import Image, Special, Text

BITS = st.one_of(st.text(max_size=8), st.sampled_from(["<|eot|>", "<|image|>", "<|", "|>", "<|eot", "\n\n", " a"]))


def test_user_text_never_becomes_a_special_token(tokenizer: Tokenizer, spelled: str) -> None:
    ids = tokenizer.encode_text(spelled, allow_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special=True) == spelled


def test_a_spelled_special_token_gets_the_ids_of_ordinary_text(spelled: str) -> None:
    """Those that the same merges give without any special tokens; here "<|" and "|>" are merged, so that cutting inside would show."""
    backend = build_byte_tokenizer(300, ["a <|b|> c", "d <|e|> f"])
    raw = json.loads(backend.to_str())
    without = tokenizers.Tokenizer.from_str(json.dumps({**raw, "added_tokens": [], "post_processor": None}))
    assert "<|" in without.encode("a <|b|>").tokens[1]
    assert Tokenizer(backend, source="test").encode_text(spelled, allow_special=False) == without.encode(spelled).ids


@given(bits=st.lists(BITS, max_size=6))
def test_any_user_text_keeps_its_text_and_gives_no_special_token(tokenizer: Tokenizer, bits: list[str]) -> None:
    text = "".join(bits)
    ids = tokenizer.encode_text(text, allow_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special=False) == text


@given(bits=st.lists(BITS, max_size=6))
def test_ids_with_special_tokens_equal_transformers(tokenizer: Tokenizer, hf: Any, bits: list[str]) -> None:
    text = "".join(bits)
    assert tokenizer.encode_text(text, allow_special=True) == hf.encode(text, add_special_tokens=False)
    if "<|" not in text:
        assert tokenizer.encode_text(text, allow_special=False) == hf.encode(text, add_special_tokens=False)


def test_a_prompt_begins_with_bos_once(tokenizer: Tokenizer, hf: Any) -> None:
    bos = tokenizer.bos_id
    assert tokenizer.prompt_ids("Hello there") == hf.encode("Hello there")
    assert tokenizer.prompt_ids("Hello there")[0] == bos
    assert tokenizer.prompt_ids("<|begin_of_text|>Hello there") == hf.encode("Hello there")
    assert tokenizer.prompt_ids("") == [bos]


def test_special_tokens_in_a_prompt_are_meant(tokenizer: Tokenizer) -> None:
    assert tokenizer.prompt_ids("hi<|eot|>")[-1] == tokenizer.special_id("<|eot|>")


def test_neighbouring_texts_are_encoded_as_one(tokenizer: Tokenizer) -> None:
    eot = tokenizer.special_id("<|eot|>")
    pieces = [Text("The cap"), Text("ital"), Special("<|eot|>"), Text(""), Text("of Fr"), Text("ance")]
    whole = [*tokenizer.encode_text("The capital", allow_special=False), eot]
    assert tokenizer.encode_pieces(pieces) == [*whole, *tokenizer.encode_text("of France", allow_special=False)]


def test_what_pieces_may_not_hold(tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"no special token '<\|im_start\|>'[\s\S]*--chat-template"):
        tokenizer.encode_pieces([Special("<|im_start|>")])
    with pytest.raises(RequestError, match="image input is not built yet"):
        tokenizer.encode_pieces([Image(0)])


def test_text_that_is_not_unicode_is_a_request_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"not valid Unicode: .* at character 2"):
        tokenizer.encode_text("ab\ud800", allow_special=True)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json[\s\S]*fix: copy"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", '{"version": "1.0"}', "\0\1"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_files_that_make_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        Tokenizer.from_folder(tmp_path)


def test_a_folder_in_an_older_layout_is_converted(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate([*alphabet, "hi", "<|endoftext|>"])}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh i\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    converted = Tokenizer.from_folder(tmp_path)
    assert converted.encode_text("hi!", allow_special=False) == [256, alphabet.index("!")]
    assert converted.special_id("<|endoftext|>") == converted.bos_id == 257


def test_truncation_and_padding_kept_in_the_file_are_undone(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    backend = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    backend.save(str(copy / "tokenizer.json"))
    ids = Tokenizer.from_folder(copy).encode_text("The capital of France is Paris.", allow_special=False)
    assert ids == Tokenizer.from_folder(folder).encode_text("The capital of France is Paris.", allow_special=False)


def _special(token: str, **flags: bool) -> AddedToken:
    return AddedToken(token, special=True, normalized=False, **flags)


def _bytes_with(*tokens: AddedToken) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(tokens))
    return backend


@given(bits=st.lists(st.sampled_from(["<L>", "<R>", "W", " ", "\n", "a", "_", "<"]), max_size=8))
@example(bits=["a", " ", "<L>", " ", "<R>", " ", "W", "a", "_", "W", " ", "W"])
def test_white_space_and_word_flags_equal_the_library(bits: list[str]) -> None:
    text = "".join(bits)
    flags = (_special("<L>", lstrip=True), _special("<R>", rstrip=True), _special("W", single_word=True))
    plain = _bytes_with(*flags)
    ours = Tokenizer(_bytes_with(*flags), source="test")
    assert ours.encode_text(text, allow_special=True) == plain.encode(text, add_special_tokens=False).ids


def test_a_special_token_that_is_also_a_word_of_the_model_is_cut() -> None:
    vocab = {"<|x|>": 0, "<": 1, "|x|>": 2, "a": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.add_special_tokens([_special("<|x|>")])
    cut = Tokenizer(backend, source="test")
    assert cut.encode_text("<|x|>", allow_special=True) == [0]
    assert cut.encode_text("<|x|>", allow_special=False) == [1, 2]
    assert cut.encode_text("a", allow_special=False) == [3]


def test_a_tokenizer_that_needs_the_whole_text_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"▁": 0, "a": 1, "▁a": 2}, merges=[("▁", "a")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([_special("<s>")])
    with pytest.raises(CheckpointError, match="byte-level BPE"):
        Tokenizer(backend, source="test")


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("東京 <", allow_special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == "東京 <".encode()
    assert tokenizer.token_bytes(tokenizer.special_id("<|eot|>")) == b"<|eot|>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.vocab_size == 512


def test_a_token_is_spelled_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [*tokenizer.encode_text("東京 <", allow_special=False), tokenizer.special_id("<|eot|>"), 10**6]
    texts = [tokenizer.decode([i], skip_special=False) for i in ids]
    assert [tokenizer.token_text(i) for i in ids] == texts
    monkeypatch.setattr(Tokenizer, "decode", lambda *_, **__: pytest.fail("it was decoded again"))
    assert [tokenizer.token_text(i) for i in ids] == texts


def test_many_threads_get_the_ids_of_one(tokenizer: Tokenizer) -> None:
    texts = [f"<|eot|> number {i} <|header_start|>" for i in range(300)]
    alone = [tokenizer.encode_text(t, allow_special=i % 2 == 0) for i, t in enumerate(texts)]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda p: tokenizer.encode_text(p[1], allow_special=p[0] % 2 == 0), enumerate(texts))
    assert list(together) == alone


def test_the_front_end_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, l4core.engine.frontend; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
