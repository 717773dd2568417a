"""A server process for the tests that send it signals: serve_fake.py FOLDER DRAIN_SECONDS. Prints what `l4 serve` prints."""

from __future__ import annotations

import asyncio
import sys

from l4core.config import EngineConfig, ServerConfig
from l4core.server.app import build_app
from l4core.server.lifecycle import Serving


async def main() -> None:
    engine = EngineConfig(
        model=sys.argv[1], served_model_name="smol", download_dir=sys.argv[3] if sys.argv[3:] else None
    )
    server = ServerConfig(port=0, drain_seconds=float(sys.argv[2]))
    await Serving(engine, server, build_app=build_app, factory="fake_engine:build").run()


asyncio.run(main())
