"""examples/l4-chatml-template against the ChatML template that checkpoints carry, on a tokenizer with its special tokens."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from l4core.chat.templates import choose_template
from l4core.chat.tokenizer import Tokenizer
from l4core.plugin_entries import Provided
from l4core.testing.models.tokenizers import make_byte_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "l4-chatml-template"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_ids_equal_the_checkpoints_own_chatml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    hooks = importlib.import_module("l4_chatml_template")
    entries = [Provided(entry=e, distribution="l4-chatml-template", version="0.1.0") for e in hooks.l4_chat_templates()]
    specials = make_byte_tokenizer(tmp_path, chat_template=CHATML, extra_specials=("<|im_start|>", "<|im_end|>"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    plugin = choose_template("chatml", tmp_path, tokenizer, entries)
    own = choose_template(None, tmp_path, tokenizer, entries)
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": spelled + "<|im_end|>"}]
    ids = tokenizer.encode_pieces(plugin.template.render(dialog))
    assert ids == tokenizer.encode_pieces(own.template.render(dialog))
    assert ids.count(specials["<|im_end|>"]) == 2
    assert plugin.stop_ids == (specials["<|im_end|>"],)
