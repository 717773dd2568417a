"""Logging of the command line: one line a record on stderr, so that stdout stays the answer."""

from __future__ import annotations

import logging


def configure_logging(level: str) -> None:
    """level: "debug", "info", "warning" or "error". Leaves handlers alone that a host program has already set up."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)-7s %(name)s  %(message)s", datefmt="%H:%M:%S"
    )
    for chatty in ("httpx", "httpcore", "filelock", "urllib3", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
