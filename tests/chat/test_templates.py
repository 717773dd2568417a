from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from l4core.chat.jinja import JinjaTemplate
from l4core.chat.llama4 import Llama4Template
from l4core.chat.templates import NoTemplate, choose_template
from l4core.chat.tokenizer import Tokenizer
from l4core.errors import CheckpointError, ConfigError, PluginError
from l4core.plugin_api import PLUGIN_API, ChatTemplate, ChatTemplateEntry, Piece, Special
from l4core.plugin_entries import Provided
from l4core.testing.models.tokenizers import make_byte_tokenizer

USER = [{"role": "user", "content": "hi"}]


class _Picky(ChatTemplate):
    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        if messages[0]["role"] != "system":
            raise ValueError("a system message must be first")
        return [Special("<|eot|>")]


def create_picky() -> _Picky:
    return _Picky()


def create_nothing() -> str:
    return "not a template"


def _entry(name: str, create: str, *stop_tokens: str) -> Provided[ChatTemplateEntry]:
    entry = ChatTemplateEntry(name=name, api=PLUGIN_API, create=create, stop_tokens=stop_tokens)
    return Provided(entry=entry, distribution="l4-test", version="1.2")


LLAMA4 = _entry("llama-4", "l4core.chat.llama4:create", "<|eot|>", "<|eom|>")


@pytest.fixture
def bare(folder: Path, tmp_path: Path) -> Path:
    """A folder without a template."""
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    return tmp_path / "bare"


def _write_config(folder: Path, chat_template: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": chat_template}))


def _rendered(template: ChatTemplate) -> list[Piece]:
    return template.render(USER)


def test_an_entry_named_by_the_flag_wins(folder: Path, tokenizer: Tokenizer) -> None:
    chosen = choose_template("llama-4", folder, tokenizer, [LLAMA4])
    assert isinstance(chosen.template, Llama4Template)
    assert chosen.source == "llama-4 (l4-test 1.2)"
    assert chosen.stop_ids == (tokenizer.special_id("<|eot|>"), tokenizer.special_id("<|eom|>"))


def test_a_file_named_by_the_flag_wins(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ bos_token }}own")
    chosen = choose_template(str(path), folder, tokenizer, [LLAMA4])
    assert _rendered(chosen.template)[0] == Special("<|begin_of_text|>")
    assert chosen.source == str(path)
    assert chosen.stop_ids == ()


def test_the_checkpoints_own_file_is_next(folder: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    chosen = choose_template(None, folder, tokenizer, [LLAMA4])
    assert isinstance(chosen.template, JinjaTemplate)
    assert chosen.source == str(folder / "chat_template.jinja")
    assert caplog.records == []


@pytest.mark.parametrize(
    "found",
    [
        "own {{ eos_token }}",
        [{"name": "rag", "template": "no"}, {"name": "default", "template": "own {{ eos_token }}"}],
    ],
)
def test_then_its_tokenizer_config(bare: Path, tokenizer: Tokenizer, found: Any) -> None:
    _write_config(bare, found)
    assert _rendered(choose_template(None, bare, tokenizer, [LLAMA4]).template)[1] == Special("<|eot|>")


def test_then_the_file_of_older_multimodal_uploads(bare: Path, tokenizer: Tokenizer) -> None:
    (bare / "chat_template.json").write_text(json.dumps({"chat_template": "{{ bos_token }}"}))
    assert _rendered(choose_template(None, bare, tokenizer, [LLAMA4]).template) == [Special("<|begin_of_text|>")]


def test_a_special_token_may_be_written_as_an_object(bare: Path, tokenizer: Tokenizer) -> None:
    _write_config(bare, "{{ bos_token }}{{ unk_token }}")
    path = bare / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": {"content": "<|begin_of_text|>", "special": True}}
    path.write_text(json.dumps(config | {"add_bos_token": True}))
    assert _rendered(choose_template(None, bare, tokenizer, []).template) == [Special("<|begin_of_text|>")]


def test_without_any_the_built_in_is_used_with_one_warning(
    bare: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = choose_template(None, bare, tokenizer, [LLAMA4])
    assert isinstance(chosen.template, Llama4Template)
    assert [(r.levelno, "brings no chat template; the built-in llama-4" in r.message) for r in caplog.records] == [
        (logging.WARNING, True)
    ]


def _without_llama4_tokens(tmp_path: Path) -> Tokenizer:
    import tokenizers

    make_byte_tokenizer(tmp_path / "other", chat_template=None)
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|header_", "<|other_"))
    return Tokenizer(tokenizers.Tokenizer.from_file(str(path)), source="other")


def test_a_checkpoint_no_template_fits_still_serves_completions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = _without_llama4_tokens(tmp_path)
    for entries in ([LLAMA4], []):
        caplog.clear()
        chosen = choose_template(None, tmp_path / "other", tokenizer, entries)
        assert isinstance(chosen.template, NoTemplate)
        assert len(caplog.records) == 1
        with pytest.raises(ValueError, match=r"brings no chat template[\s\S]*--chat-template"):
            chosen.template.render(USER)


def test_a_named_template_that_does_not_fit_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no special token '<\|header_start\|>'"):
        choose_template("llama-4", tmp_path, _without_llama4_tokens(tmp_path), [LLAMA4])


def test_a_stop_token_the_tokenizer_lacks_ends_the_start(folder: Path, tokenizer: Tokenizer) -> None:
    wrong = _entry("wrong", f"{__name__}:create_picky", "<|im_end|>")
    with pytest.raises(CheckpointError, match=r"no special token '<\|im_end\|>'"):
        choose_template("wrong", folder, tokenizer, [_importable(wrong)])


def test_a_template_that_wants_more_than_a_user_message_is_taken(folder: Path, tokenizer: Tokenizer) -> None:
    chosen = choose_template("picky", folder, tokenizer, [_importable(_entry("picky", f"{__name__}:create_picky"))])
    assert isinstance(chosen.template, ChatTemplate)


def _importable(provided: Provided[ChatTemplateEntry]) -> Provided[ChatTemplateEntry]:
    """This test module can be imported by its name while its tests run."""
    import importlib

    importlib.import_module(provided.entry.create.partition(":")[0])
    return provided


def test_an_entry_that_makes_no_template_is_named(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(PluginError, match=r"l4-test 1\.2.*returned str; wanted a ChatTemplate"):
        choose_template("bad", folder, tokenizer, [_importable(_entry("bad", f"{__name__}:create_nothing"))])


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("lama4", r"'lama4' is no known template \(llama-4\) and no .jinja file\n  fix: --chat-template llama-4"),
        ("zzz", "fix: l4 plugins lists"),
        ("missing.jinja", "missing.jinja cannot be read"),
    ],
)
def test_a_flag_that_names_nothing(folder: Path, tokenizer: Tokenizer, named: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        choose_template(named, folder, tokenizer, [LLAMA4])


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ("{% for %}", r"tokenizer_config.json is not Jinja: .*line 1[\s\S]*--chat-template llama-4"),
        ([{"name": "rag", "template": "x"}], "names the chat templates rag; wanted one called default"),
        (3, "is a int; wanted a string"),
    ],
)
def test_a_damaged_template_is_named(bare: Path, tokenizer: Tokenizer, found: Any, told: str) -> None:
    _write_config(bare, found)
    with pytest.raises(CheckpointError, match=told):
        choose_template(None, bare, tokenizer, [LLAMA4])


@pytest.mark.parametrize(("text", "told"), [("{", "is not JSON"), ("[]", "holds a list"), ("\udcff", "cannot be read")])
def test_a_damaged_config_is_named(bare: Path, tokenizer: Tokenizer, text: str, told: str) -> None:
    (bare / "tokenizer_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=f"tokenizer_config.json {told}"):
        choose_template(None, bare, tokenizer, [LLAMA4])
