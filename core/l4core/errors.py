"""Every error a user can meet. Each says what was found, what was wanted and, where one exists, the command or flag that fixes it."""

from __future__ import annotations


class L4Error(Exception):
    """Base of all errors that L4 raises on purpose.

    message: what was found and what was wanted.  fix: a command, flag or edit that helps; may be empty.
    """

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class ConfigError(L4Error):
    """An option has an unknown name, a wrong type or a value out of range."""


class NotBuiltError(ConfigError):
    """An option asks for something that this version of L4 does not do yet; it is refused, never ignored."""


class CheckpointError(L4Error):
    """A checkpoint folder, its config, its tokenizer or a weight is missing, unknown, damaged or of the wrong shape."""


class CapacityError(L4Error):
    """Memory does not hold what was asked for; names the largest value that would fit."""


class PluginError(L4Error):
    """A plugin failed to load, broke the contract, or two plugins claim one name."""


class BackendUnavailable(L4Error):  # noqa: N818  (the name plugin authors know from the design)
    """An attention backend refuses at creation (or its smoke check failed). `reason` is the message."""

    @property
    def reason(self) -> str:
        return self.message


class RequestError(L4Error, ValueError):
    """One request is wrong; the engine goes on.

    status: HTTP status (400, 404, 413, 429, 503).  param: the request field at fault.  code: OpenAI's machine-readable code.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class EngineDeadError(L4Error):
    """The engine process ended; the message carries its last words."""


class RankLostError(EngineDeadError):
    """Another rank of the engine is gone, hangs or cannot be reached: this one ends too, and all start again."""
