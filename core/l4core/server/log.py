"""Where a server process logs to, and how much."""

from __future__ import annotations

import logging

from l4core.config import ServerConfig


def log_level(config: ServerConfig) -> int:
    """Python's number of `--log-level`."""
    return logging.getLevelNamesMapping()[config.log_level.upper()]


def configure_logging(config: ServerConfig) -> None:
    """To stderr, unless the host program set logging up."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("l4core").setLevel(log_level(config))
