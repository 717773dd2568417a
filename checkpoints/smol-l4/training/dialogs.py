"""One dialog in two forms. Dialogs are stored as the teacher's ChatML stream; `Pairs` gives the teacher's and the student's form, with the
positions in each that predict the same token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l4core.demo.arch import BOT, END_OF_TEXT, EOT, HEADER_END, HEADER_START, IM_END, IM_START
from training.arrays import Tokens
from training.prompts import DEFAULT_SYSTEM, NEWLINE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPT, ANSWER, END = 0, 1, 2
Message = tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """teacher, student: ids.  at_teacher[i] and at_student[i] are positions that predict the same token, of kind[i]: PROMPT (a question's
    token), ANSWER (an answer's), or END (the end of either)."""

    teacher: list[int]
    student: list[int]
    at_teacher: list[int]
    at_student: list[int]
    kind: list[int]


def parse(stream: Sequence[int] | Tokens) -> tuple[list[Message], bool]:
    """ChatML ids → ((role ids, content ids) of each message, whether the last one is closed)."""
    ids = [int(t) for t in stream]
    messages: list[Message] = []
    at, closed = 0, True
    while at < len(ids) and ids[at] == IM_START:
        if NEWLINE not in ids[at:]:  # cut inside a header
            return messages, True
        line = ids.index(NEWLINE, at)
        closed = IM_END in ids[line:]
        end = ids.index(IM_END, line) if closed else len(ids)
        messages.append((ids[at + 1 : line], ids[line + 1 : end]))
        at = end + 1
        if at < len(ids) and ids[at] == NEWLINE:
            at += 1
    return messages, closed


def openings(dialogs: Sequence[Tokens], assistant: list[int], longest: int = 300) -> list[tuple[int, ...]]:
    """The ChatML beginnings of dialogs, up to where the first answer starts."""
    found = []
    for stream in dialogs:
        ids: list[int] = []
        for role, content in parse(stream)[0]:
            ids += [IM_START, *role, NEWLINE]
            if role == assistant:
                if len(ids) <= longest:
                    found.append(tuple(ids))
                break
            ids += [*content, IM_END, NEWLINE]
    return found


class Pairs:
    """tokenizer: the teacher's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.default = tokenizer.encode(DEFAULT_SYSTEM).ids
        self.assistant = tokenizer.encode("assistant").ids
        self.user = tokenizer.encode("user").ids

    def dialog(self, stream: Sequence[int] | Tokens) -> Pair:
        """The teacher keeps its default system text, the student has none."""
        messages, closed = parse(stream)
        pair = Pair(teacher=[], student=[BOT], at_teacher=[], at_student=[], kind=[])
        for index, (role, content) in enumerate(messages):
            done = closed or index < len(messages) - 1
            pair.teacher.extend([IM_START, *role, NEWLINE])
            if index > 0 or content != self.default:
                self._student_message(pair, role, content, done)
            pair.teacher.extend([*content, *([IM_END, NEWLINE] if done else [])])
        return pair

    def _student_message(self, pair: Pair, role: list[int], content: list[int], done: bool) -> None:
        """pair.teacher ends with this message's header; its content is not there yet."""
        pair.student.extend([HEADER_START, *role, HEADER_END, NEWLINE, NEWLINE])
        count = len(content) + done
        pair.at_teacher.extend(range(len(pair.teacher) - 1, len(pair.teacher) - 1 + count))
        pair.at_student.extend(range(len(pair.student) - 1, len(pair.student) - 1 + count))
        pair.kind.extend([ANSWER if role == self.assistant else PROMPT] * len(content) + [END] * done)
        pair.student.extend([*content, *([EOT] if done else [])])


def text_pair(tokens: Sequence[int] | Tokens) -> Pair:
    """Plain text: the same tokens behind each model's own first token."""
    ids = [int(t) for t in tokens]
    places = list(range(len(ids)))
    return Pair(
        teacher=[END_OF_TEXT, *ids[:-1]],
        student=[BOT, *ids[:-1]],
        at_teacher=places,
        at_student=places,
        kind=[PROMPT] * len(ids),
    )
