"""A conversation with a model in this process, streamed token by token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from l4core.config import EngineConfig
from l4core.engine.frontend import Frontend
from l4core.engine.inbox import Inbox
from l4core.engine.start.build import build_engine
from l4core.errors import RequestError
from l4core.request import FinishReason, SamplingParams


class LocalChat:
    """Loads the model once. changes: SamplingParams fields over the checkpoint's defaults."""

    def __init__(self, config: EngineConfig, changes: Mapping[str, Any]) -> None:
        self._built = build_engine(config)
        self._frontend = Frontend.from_plugins(
            config, self._built.model_config, self._built.folder, self._built.plugins
        )
        self._params = SamplingParams(**{**self._frontend.default_params(), **changes})
        self._ids = itertools.count()

    @property
    def report(self) -> tuple[str, ...]:
        """The start-up block."""
        return self._built.report

    def answer(self, messages: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Pieces of the answer as they come. Closing the iterator early aborts the request. RequestError when it is refused."""
        ids = self._frontend.chat_ids(messages)
        (request,) = self._frontend.requests(f"chat-{next(self._ids)}", ids, self._params, self._built.context_length)
        engine = self._built.engine
        engine.check(request)
        assembler = self._frontend.assembler(request)
        inbox, running = Inbox(requests=[request]), True
        try:
            while running:
                for update in engine.step(inbox).updates:
                    delta = assembler.feed(update)
                    running = update.finish_reason is None
                    yield delta.text
                    if delta.finish_reason is FinishReason.ERROR:
                        raise RequestError(delta.error)
                    if delta.finish_reason is not None:  # a stop string ends the answer before the engine does
                        return
                inbox = Inbox()
        finally:
            if running:
                engine.step(Inbox(aborts=[request.request_id]))
