"""What all handlers share: the loaded model's front end, the bridge, the limits. One per server; no global."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from l4core import __version__
from l4core.config import EngineConfig, ServerConfig
from l4core.engine.process.messages import Ready
from l4core.errors import RequestError
from l4core.request import Request
from l4core.server.bridge import EngineState
from l4core.server.metrics import Metrics
from l4core.server.replicas import Engines, Updates

if TYPE_CHECKING:
    from l4core.engine.frontend import Frontend

LONG_TEXT_CHARACTERS = 32_768
LEAST_BODY_BYTES, TOKEN_BODY_BYTES = 8 << 20, 16
"""Of the largest body where none is set. A token takes 8 bytes as a JSON number, about 5 as text, and more where clients escape it."""
FINGERPRINT = f"l4-{__version__}"
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What is known once the engine has the model. created: when that was, Unix seconds."""

    frontend: Frontend
    context_length: int
    created: int


class Service:
    """State of one server. draining: SIGTERM came; what runs may finish, nothing new is taken."""

    def __init__(
        self, engine_config: EngineConfig, server_config: ServerConfig, *, bridge: Engines, metrics: Metrics
    ) -> None:
        self.server_config = server_config
        self.bridge = bridge
        self.metrics = metrics
        self.model_name = model_name(engine_config)
        self.loaded_model: Loaded | None = None
        self.draining = False

    @property
    def healthy(self) -> bool:
        """The engine process runs and the model is loaded."""
        return self.loaded_model is not None and self.bridge.state is EngineState.READY

    @property
    def num_ready(self) -> int:
        """Engines that run, once the first model is loaded."""
        return 0 if self.loaded_model is None else self.bridge.num_ready

    @property
    def status(self) -> str:
        """The engine's state as a word, or "draining"."""
        if self.draining:
            return "draining"
        state = self.bridge.state
        return EngineState.STARTING.value if state is EngineState.READY and not self.healthy else state.value

    @property
    def loaded(self) -> Loaded:
        """Raises RequestError (503) while the model is loading for the first time."""
        if self.loaded_model is None:
            raise RequestError("the model is still loading", status=503, code="engine_not_ready")
        return self.loaded_model

    @property
    def max_body_bytes(self) -> int:
        """Largest body that is read: as set, or what a prompt of the whole context may take."""
        if self.server_config.max_body_bytes is not None:
            return self.server_config.max_body_bytes
        context = self.loaded_model.context_length if self.loaded_model is not None else 0
        return max(LEAST_BODY_BYTES, TOKEN_BODY_BYTES * context)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError (404) for a model that is not this one. No name means this one: there is only one."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name!r} does not exist; this server has {self.model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def check_count(self, count: int) -> None:
        """Raises RequestError (400) for more sequences than this server ever takes, before work is spent on them."""
        limit = self.server_config.max_queued_requests
        if count > limit:
            raise RequestError(
                f"the request asks for {count} sequences (prompts × n); this server takes at most {limit}"
            )

    def submit(self, requests: Sequence[Request]) -> Updates:
        """`Bridge.submit`, unless the server is draining (503)."""
        if self.draining:
            raise RequestError("the server is shutting down", status=503, code="draining")
        return self.bridge.submit(requests)


def model_name(config: EngineConfig) -> str:
    """The name clients use."""
    return config.served_model_name or config.model


async def off_loop_if_long(num_characters: int, work: Callable[[], R]) -> R:
    """Run `work` (tokenising, detokenising); in a thread when the text is long enough to make the other streams stutter."""
    return await asyncio.to_thread(work) if num_characters > LONG_TEXT_CHARACTERS else work()


def text_ids(frontend: Frontend, text: str, *, add_special: bool) -> list[int]:
    """Ids of a prompt; special tokens spelled in it are meant. add_special: BOS first, unless it is there."""
    return frontend.text_ids(text) if add_special else frontend.tokenizer.encode_text(text, allow_special=True)


def load_frontend(config: EngineConfig, ready: Ready) -> Frontend:
    """Tokenizer, template and request maker of the checkpoint the engine loaded. Raises CheckpointError, ConfigError, PluginError."""
    from l4core.engine.frontend import Frontend
    from l4core.model.config import ModelConfig
    from l4core.plugin_manager import load_plugins

    folder = Path(ready.folder)
    return Frontend.from_plugins(config, ModelConfig.from_folder(folder), folder, load_plugins())
