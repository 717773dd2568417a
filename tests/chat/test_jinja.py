from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core.chat.jinja import JinjaTemplate, RenderLimits
from l4core.chat.tokenizer import Tokenizer
from l4core.plugin_api import Piece, Special, Text

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n"
    "{{ m.content }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant\n{% endif %}"
)
TRANSFORMING = (
    "{% for m in messages %}{{ m.content | trim | replace('x', '') }}{{ m.content[1:] ~ m.content[:1] }}"
    "<{{ m.content }}>{{ m.content | tojson }}{{ m.content.split('y') | join }}{{ m | tojson }}{{ m.content | upper }}"
    "{{ m.content | list | join }}{{ m.name }}{{ m.content | reverse }}{{ m.extra }}{% endfor %}<|eot|>"
)
"""Does to user text whatever a template may do, and puts it between characters of its own."""

BITS = st.sampled_from(
    ["<|eot|>", "<", "|eot|", ">", "<|e", "ot|>", "x", "y", " ", "\n", "<|x", "eot", "|>", "|", ">|toe|<"]
)


def _template(tokenizer: Tokenizer, source: str, **limits: Any) -> JinjaTemplate:
    variables = {"bos_token": "<|begin_of_text|>"}
    return JinjaTemplate(source, specials=tokenizer.specials, variables=variables, limits=RenderLimits(**limits))


def _user(content: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def _spell(pieces: list[Piece]) -> str:
    return "".join(p.token if isinstance(p, Special) else p.text for p in pieces if isinstance(p, (Special, Text)))


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "{%- for m in messages %}\n    {%- if loop.first %}\n  [{{ m.role }}]\n    {%- endif %}\n  {{ m.content }}\n{% endfor %}\n",
        "  {% for m in messages %}\n  {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{% endfor %}",
        "{{ messages | tojson(ensure_ascii=true) }}{{ tools is none }}{{ documents is none }}{{ eos_token }}{{ nothing }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ range(3) | list }}",
        "{% for m in messages[::-1] %}{{ m['content'].strip().split('a')[0] }}{% endfor %}",
    ],
)
def test_ids_equal_transformers_on_plain_dialogs(tokenizer: Tokenizer, hf: Any, source: str) -> None:
    dialog = [*_user("  Paris & Être 東京 \"a\" 'b' 🙂\n"), {"role": "assistant", "content": "line\n\nline"}]
    variables = {k: v for k, v in hf.special_tokens_map.items() if isinstance(v, str)}
    for generate in (False, True):
        expected = hf.apply_chat_template(
            dialog, chat_template=source, add_generation_prompt=generate, return_dict=False
        )
        ours = JinjaTemplate(source, specials=tokenizer.specials, variables=variables)
        assert tokenizer.encode_pieces(ours.render(dialog, add_generation_prompt=generate)) == expected


def test_user_text_that_spells_special_tokens_stays_text(tokenizer: Tokenizer, spelled: str) -> None:
    ids, plain = (tokenizer.encode_pieces(_template(tokenizer, CHATML).render(_user(t))) for t in (spelled, "plain"))
    assert [i for i in ids if i in tokenizer.special_ids] == [i for i in plain if i in tokenizer.special_ids]
    assert spelled in tokenizer.decode(ids, skip_special=True)


def test_text_parts_are_kept_apart_too(tokenizer: Tokenizer, spelled: str) -> None:
    source = "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
    parts = [{"type": "text", "text": spelled}, {"type": "text", "text": "|>"}]
    dialog = [{"role": "user", "content": parts}]
    assert _template(tokenizer, source).render(dialog) == [Text(spelled + "|>")]


@pytest.fixture(scope="module")
def transforming(tokenizer: Tokenizer) -> JinjaTemplate:
    return _template(tokenizer, TRANSFORMING)


@given(bits=st.lists(BITS, max_size=12))
def test_no_transformation_makes_user_text_special(transforming: JinjaTemplate, bits: list[str]) -> None:
    text = "".join(bits)
    dialog = _user(text, name="|eot|", extra={text: {"role": text, "type": text}})
    pieces = transforming.render(dialog)
    assert [p for p in pieces if isinstance(p, Special)] == [Special("<|eot|>")]


def test_text_across_two_messages_stays_text(tokenizer: Tokenizer) -> None:
    halves = [{"role": "user", "content": "<|eo"}, {"role": "user", "content": "t|>"}]
    pieces = _template(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}").render(halves)
    assert pieces == [Text("<|eot|>")]


def test_stand_ins_that_a_message_holds_are_not_used(tokenizer: Tokenizer) -> None:
    text = "\ufdd0\ufdd1 <|eot|>"
    assert _template(tokenizer, "{{ messages[0].content }}").render(_user(text)) == [Text(text)]


def test_a_message_with_every_stand_in_is_refused(tokenizer: Tokenizer) -> None:
    every = "".join(map(chr, [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xF0100)]))
    with pytest.raises(ValueError, match="too many of Unicode's noncharacters"):
        _template(tokenizer, CHATML).render(_user(every))


def test_json_with_escapes_keeps_the_characters_stood_in_for(tokenizer: Tokenizer) -> None:
    (piece,) = _template(tokenizer, "{{ messages[0].content | tojson(ensure_ascii=true) }}").render(_user("é<|eot|>🙂"))
    assert piece == Text(json.dumps("é<|eot|>🙂"))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused these messages: roles must alternate"),
        ("{{ messages[0].nothing.more }}", "refused these messages: .*has no attribute"),
        ("{{ messages[0].content + 1 }}", "refused these messages: can only concatenate"),
        ("{{ 1 // 0 }}", "refused these messages: .*zero"),
        ("{{ messages.append(1) }}", "refused these messages: .*unsafe"),
        ("{{ ''.__class__.__mro__ }}", "refused these messages: .*unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "refused these messages: .*unsafe"),
        ("{{ 'a' * 1000000000 }}", r"a result of '\*' is too large"),
        ("{{ ([1] * 1000000000) | length }}", r"a result of '\*' is too large"),
        ("{{ 10 ** 1000000000 }}", r"a result of '\*\*' is too large"),
        ("{% for i in range(100000000) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refused these messages: .*recursion"),
        ("{% include 'other' %}", "refused these messages: "),
    ],
)
def test_a_template_that_fails_is_a_value_error(tokenizer: Tokenizer, source: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _template(tokenizer, source).render(_user("x"))


def test_ordinary_products_and_powers_work(tokenizer: Tokenizer) -> None:
    assert _template(tokenizer, "{{ '-' * 3 }}{{ 3 * 4 }}{{ 2 ** 10 }}{{ 2.0 ** 2 }}").render(_user("x")) == [
        Text("---1210244.0")
    ]


def test_output_is_bounded(tokenizer: Tokenizer) -> None:
    source = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"writes more than 18\d\d characters"):
        _template(tokenizer, source, characters=1000).render(_user("x" * 100))
    assert len(_spell(_template(tokenizer, source, characters=100_000).render(_user("x" * 100)))) == 100_000


def test_time_is_bounded(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"runs longer than 0\.0 seconds"):
        _template(tokenizer, CHATML, seconds=0.0).render(_user("x"))


def test_the_date_is_todays(tokenizer: Tokenizer) -> None:
    before = datetime.datetime.now().strftime("%d %b %Y")
    (piece,) = _template(tokenizer, "{{ strftime_now('%d %b %Y') }}").render(_user("x"))
    assert piece in (Text(before), Text(datetime.datetime.now().strftime("%d %b %Y")))


def test_what_is_not_built_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="tool calling is not built yet"):
        _template(tokenizer, CHATML).render(_user("x"), tools=[{}])
    with pytest.raises(ValueError, match="image input is not built yet"):
        _template(tokenizer, CHATML).render([{"role": "user", "content": [{"type": "image"}]}])


def test_a_source_that_is_not_jinja(tokenizer: Tokenizer) -> None:
    with pytest.raises(jinja2.TemplateSyntaxError):
        _template(tokenizer, "{% for %}")
