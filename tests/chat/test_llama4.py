from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from l4core.chat.llama4 import Llama4Template, create
from l4core.chat.tokenizer import Tokenizer
from l4core.plugin_api import Image, Piece, Special, Text
from l4core.testing.conformance import ChatTemplateConformance

DIALOG = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris."},
    {"role": "user", "content": "And of Spain?"},
]
# fmt: off
META_IDS = (
    200000, 200005, 15651, 200006, 368, 4662, 583, 262, 19933, 43910, 26, 200008,
    200005, 1556, 200006, 368, 3668, 373, 290, 7963, 323, 11698, 43, 200008,
    200005, 140680, 200006, 368, 954, 7963, 323, 11698, 373, 13796, 26, 200008,
    200005, 1556, 200006, 368, 4122, 323, 31154, 43, 200008, 200005, 140680, 200006, 368,
)
# fmt: on
"""DIALOG as Meta's own ChatFormat (llama-models 0.3.0) encodes it for generation, with the released tokenizer."""

META_SPECIAL_IDS = {
    "<|begin_of_text|>": 200000,
    "<|header_start|>": 200005,
    "<|header_end|>": 200006,
    "<|eot|>": 200008,
}
BLANK_LINE = 368
ROLE_IDS = {"system": 15651, "user": 1556, "assistant": 140680}


def _spell(pieces: list[Piece]) -> str:
    return "".join(p.token if isinstance(p, Special) else p.text if isinstance(p, Text) else "[image]" for p in pieces)


def test_the_pieces_lie_as_metas_ids_do() -> None:
    """Special tokens, role names and blank lines at the places where Meta has them; message texts as runs of ordinary ids."""
    known = {**META_SPECIAL_IDS, **ROLE_IDS, "\n\n": BLANK_LINE}
    ids, runs = list(META_IDS), []
    for piece in Llama4Template().render(DIALOG):
        spelling = _spell([piece])
        if spelling in known:
            assert ids.pop(0) == known[spelling]
        else:
            length = ids.index(META_SPECIAL_IDS["<|eot|>"])
            runs.append((spelling, ids[:length]))
            ids = ids[length:]
    assert ids == []
    assert [text for text, _ in runs] == [m["content"] for m in DIALOG]
    assert all(0 < len(run) <= len(text) and max(run) < 200000 for text, run in runs)


def _published() -> str:
    """The template of the released checkpoints, as transformers carries it; read from its source, for importing it takes ten seconds."""
    (package,) = find_spec("transformers").submodule_search_locations  # type: ignore[union-attr, misc]
    module = ast.parse((Path(package) / "models" / "llama4" / "processing_llama4.py").read_text())
    assigned = [n for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "chat_template"]
    return str(ast.literal_eval(assigned[0].value))


PLAIN_DIALOGS: list[list[dict[str, Any]]] = [
    DIALOG,
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "  spaces around \n"}, {"role": "user", "content": "  kept \n"}],
    [{"role": "user", "content": "a"}, {"role": "system", "content": " late "}, {"role": "user", "content": ""}],
    [{"role": "system", "content": [{"type": "text", "text": " part "}]}, {"role": "user", "content": "x"}],
    [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]}],
    [{"role": "user", "content": "weather?"}, {"role": "tool", "content": 'sunny, 22 °C "today"', "tool_call_id": "1"}],
    [{"role": "user", "content": "\n\n東京 🙂 \\n {{ bos_token }} {% raw %}"}],
]


@pytest.mark.parametrize("dialog", PLAIN_DIALOGS)
@pytest.mark.parametrize("generate", [True, False])
def test_ids_equal_the_published_template_in_transformers(
    tokenizer: Tokenizer, hf: Any, dialog: list[dict[str, Any]], generate: bool
) -> None:
    expected = hf.apply_chat_template(
        dialog, chat_template=_published(), add_generation_prompt=generate, return_dict=False
    )
    assert tokenizer.encode_pieces(create().render(dialog, add_generation_prompt=generate)) == expected


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_user_text_stays_text_in_every_role(tokenizer: Tokenizer, role: str, spelled: str) -> None:
    dialog = [{"role": "user", "content": "hi"}, {"role": role, "content": spelled}]
    harmless = [{"role": "user", "content": "hi"}, {"role": role, "content": "harmless"}]
    ids, plain = (tokenizer.encode_pieces(create().render(d)) for d in (dialog, harmless))
    assert [i for i in ids if i in tokenizer.special_ids] == [i for i in plain if i in tokenizer.special_ids]


def test_developer_is_system() -> None:
    developer = create().render([{"role": "developer", "content": " x "}, {"role": "user", "content": "y"}])
    assert developer == create().render([{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


def test_an_image_part_is_an_image_piece_in_order_of_appearance() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    parts = [image, {"type": "text", "text": "and"}, image]
    pieces = create().render([{"role": "user", "content": parts}, {"role": "user", "content": [image]}])
    assert [p for p in pieces if isinstance(p, Image)] == [Image(0), Image(1), Image(2)]
    assert _spell(pieces).startswith("<|begin_of_text|><|header_start|>user<|header_end|>\n\n[image]and[image]<|eot|>")


@pytest.mark.parametrize("role", ["system", "tool"])
def test_images_only_where_the_model_takes_them(role: str) -> None:
    with pytest.raises(ValueError, match=f"an image in a {role} message"):
        create().render([{"role": role, "content": [{"type": "image"}]}])


def test_tools_are_refused() -> None:
    with pytest.raises(ValueError, match="tool calling is not built yet"):
        create().render(DIALOG, tools=[{"type": "function"}])
    assert create().tool_parser() is None


def test_wrong_messages_are_refused() -> None:
    with pytest.raises(ValueError, match="wanted one of system"):
        create().render([{"role": "king", "content": "x"}])


def test_the_template_file_of_test_folders_writes_the_same(tokenizer: Tokenizer, folder: Path, hf: Any) -> None:
    assert (folder / "chat_template.jinja").is_file()
    for dialog in PLAIN_DIALOGS:
        expected = tokenizer.encode_pieces(create().render(dialog))
        assert hf.apply_chat_template(dialog, add_generation_prompt=True, return_dict=False) == expected


class TestConformance(ChatTemplateConformance):
    """The kit that plugin authors run."""

    plugin, template = "l4core.builtin_plugins", "llama-4"
