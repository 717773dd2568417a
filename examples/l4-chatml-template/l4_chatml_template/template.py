"""ChatML: `<|im_start|>role`, a line break, the content, `<|im_end|>` and a line break per message."""

from collections.abc import Mapping, Sequence

from l4core.plugin_api import ChatTemplate, Piece, Special, Text

ROLES = ("system", "user", "assistant", "tool")


class ChatMLTemplate(ChatTemplate):
    """Text only; tool definitions are refused. What users write goes into `Text`, so it never becomes a special token."""

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] = (),
        add_generation_prompt: bool = True,
    ) -> list[Piece]:
        if tools:
            raise ValueError("the chatml template takes no tools")
        pieces: list[Piece] = []
        for message in messages:
            role = message.get("role")
            if role not in ROLES:
                raise ValueError(f"role is {role!r}; wanted one of {', '.join(ROLES)}")
            body = Text(f"{role}\n{content_of(message)}")
            pieces += [Special("<|im_start|>"), body, Special("<|im_end|>"), Text("\n")]
        return pieces + ([Special("<|im_start|>"), Text("assistant\n")] if add_generation_prompt else [])


def content_of(message: Mapping[str, object]) -> str:
    """The message's text, whether sent as a string or as a list of text parts."""
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in parts
    ):
        raise ValueError(f"content is {content!r}; wanted text or a list of text parts")
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"content is {content!r}; wanted a string as the text of each part")
    return "".join(texts)
