"""L4's kit for chat templates, told what to look at."""

from l4_chatml_template.template import ChatMLTemplate

from l4core.plugin_api import Special, Text
from l4core.testing.conformance import ChatTemplateConformance


class TestChatML(ChatTemplateConformance):
    plugin, template = "l4_chatml_template", "chatml"


def test_the_pieces_of_a_dialog() -> None:
    pieces = ChatMLTemplate().render([{"role": "user", "content": "Hi"}])
    assert pieces == [
        Special("<|im_start|>"),
        Text("user\nHi"),
        Special("<|im_end|>"),
        Text("\n"),
        Special("<|im_start|>"),
        Text("assistant\n"),
    ]
