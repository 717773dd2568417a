"""`python -m l4_ray.leash serve DIR …`: the `l4` command, ended when whoever started it is gone.

Its standard input is the leash: nothing is written there, and the kernel closes it when the other side ends, however that ended. Then it is asked
to drain (SIGTERM) and, past its deadline, killed, so that no engine outlives its actor.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

GRACE_SECONDS = 10.0


def main() -> None:
    """Runs the command line behind it."""
    threading.Thread(target=_wait_for_the_end, args=(sys.stdin.fileno(),), name="leash", daemon=True).start()
    from l4core.cli import main as l4

    l4()


def _wait_for_the_end(leash: int) -> None:
    while os.read(leash, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(GRACE_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    main()
