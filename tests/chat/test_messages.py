from __future__ import annotations

from collections import OrderedDict
from enum import StrEnum
from typing import Any

import pytest

from l4core.chat.messages import MAX_MESSAGES, check_messages, refuse_images, text_of

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


class _Role(StrEnum):
    USER = "user"


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("hello", "messages is a str"),
        ({"role": "user"}, "messages is a dict"),
        ([], "0 messages; wanted 1 to"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), f"{MAX_MESSAGES + 1} messages"),
        (["hello"], r"messages\[0\] is a str"),
        ([{"content": "x"}], r"messages\[0\].role is None; wanted one of system"),
        ([{"role": "user", "content": "x"}, {"role": "king", "content": "x"}], r"messages\[1\].role is 'king'"),
        ([{"role": "<|eot|>", "content": "x"}], "role is '<|eot|>'"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": None}], "content is null"),
        ([{"role": "user", "content": 3}], "content is a int"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is not a content part"),
        ([{"role": "user", "content": [{"text": "x"}]}], r"content\[0\] is not a content part"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "type is 'input_audio'; wanted text or image_url"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\].text is a NoneType"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "tool calling is not built yet"),
        ([{"role": "assistant", "content": "", "function_call": {"name": "f"}}], "tool calling is not built yet"),
        ([{"role": "user", "content": "x", "extra": object()}], "holds a object; wanted plain JSON"),
    ],
)
def test_wrong_shapes_are_named(messages: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_messages(messages)


def test_too_deep_nesting_is_refused() -> None:
    nested: Any = "x"
    for _ in range(40):
        nested = [nested]
    with pytest.raises(ValueError, match="nested deeper"):
        check_messages([{"role": "user", "content": "x", "extra": nested}])


def test_what_clients_send_back_of_an_answer_is_fine() -> None:
    answer = {"role": "assistant", "content": "Paris.", "refusal": None, "annotations": [], "tool_calls": None}
    assert check_messages([answer]) == [answer]


def test_the_copy_is_plain() -> None:
    (copy,) = check_messages([OrderedDict(role=_Role.USER, content=(OrderedDict(type="text", text="x"),))])
    assert type(copy) is dict
    assert type(copy["role"]) is str
    assert copy == {"role": "user", "content": [{"type": "text", "text": "x"}]}


def test_text_of_parts_leaves_images_out() -> None:
    assert text_of([{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}]) == "ab"
    assert text_of("ab") == "ab"


def test_images_are_refused_where_a_template_cannot_take_them() -> None:
    refuse_images(check_messages([{"role": "user", "content": "x"}]))
    with pytest.raises(ValueError, match="image input is not built yet"):
        refuse_images(check_messages([{"role": "user", "content": [IMAGE]}]))
