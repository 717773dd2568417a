"""The demo tokenizer: Llama 4's special tokens behind a base vocabulary, its template, and the two newlines of a header."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from l4core.demo.arch import BASE_VOCAB, BOT, EOT, ID, SPECIAL
from l4core.demo.tokenizer import CHAT_TEMPLATE, save_tokenizer, tokenizer_from


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Three special tokens, the 256 bytes and one merge, padded to the base's size so that new ids fall where they do in the real one."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "ĊĊ"]
    tokens += [f"<unused{i}>" for i in range(BASE_VOCAB - len(tokens))]
    kinds = [3] * 3 + [1] * (BASE_VOCAB - 3)
    return tokenizer_from(tokens, kinds, ["Ċ Ċ"], llama4=True)


def test_new_tokens_have_their_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [ID[t] for t in SPECIAL] == list(range(49152, 49167))


def test_ids_are_those_that_the_weights_were_trained_with() -> None:
    """As checkpoints/smol-l4/README.md has them; the order of the list is another room's."""
    named = {t.strip("<|>"): i - 49152 for t, i in ID.items()}
    ends = {"begin_of_text": 0, "end_of_text": 1, "header_start": 2, "header_end": 3, "eom": 4, "eot": 5}
    assert named == {
        **ends,
        "image_start": 6,
        "image_end": 7,
        "tile_x_separator": 8,
        "tile_y_separator": 9,
        "image": 10,
        "patch": 11,
        "python_start": 12,
        "python_end": 13,
        "finetune_right_pad": 14,
    }


def test_plain_text_begins_with_bos_and_comes_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Grüße, 42!").ids
    assert ids[0] == BOT
    assert tokenizer.decode(ids) == "Grüße, 42!"


@pytest.mark.parametrize("tail", ["", "text", "\n\ntext"])
def test_a_header_is_followed_by_two_newline_tokens(tokenizer: Tokenizer, tail: str) -> None:
    newline = tokenizer.token_to_id("Ċ")
    ids = tokenizer.encode(f"<|header_end|>\n\n{tail}", add_special_tokens=False).ids
    if not tail.startswith("\n"):
        assert ids[1:3] == [newline, newline]
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"<|header_end|>\n\n{tail}"


def test_blank_lines_in_text_still_merge(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_to_id("ĊĊ") in tokenizer.encode("a\n\n\nb").ids


def render(messages: list[dict[str, object]]) -> str:
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    return template.render(messages=messages, bos_token="<|begin_of_text|>", add_generation_prompt=True)


def test_template() -> None:
    text = render([{"role": "user", "content": " Hi \n"}, {"role": "tool", "content": [{"type": "text", "text": "7"}]}])
    assert text == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>ipython<|header_end|>\n\n7<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_tokenizer(tokenizer, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("x").ids == tokenizer.encode("x").ids
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert (ID[config["bos_token"]], ID[config["eos_token"]]) == (BOT, EOT)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
