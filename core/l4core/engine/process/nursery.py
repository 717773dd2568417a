"""All ranks of one machine from one process: it imports what they need once, forks them, and when one ends it ends the others.

Importing torch takes seconds of a core; a fork takes milliseconds, and shares the memory. Nothing has been computed and no device has been opened
before the fork, so each rank starts as if it were alone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from l4core.engine.process.messages import Ended, frame

LAST_WORDS_SECONDS = 0.3
"""What the other ranks have to say why they end, after one has died …"""
LEAVE_SECONDS = 5.0
"""… and to end by themselves after one ended as it was meant to."""
POLL_SECONDS = 0.01


def raise_ranks(preload: str, fds: Sequence[int], report_fd: int, run: Callable[[int], int]) -> NoReturn:
    """Forks a process for each of fds, which ends with the status of `run(fd)`, and ends with 0, or 1 when one died: it does not return.

    preload: module they need.  report_fd: socket that is told of each end.
    """
    for module in ("torch.distributed", preload):
        with contextlib.suppress(Exception):  # said by each rank, which imports it again, in its own last words
            importlib.import_module(module)
    gc.collect()
    gc.freeze()
    report = socket.socket(fileno=report_fd)
    living: dict[int, int] = {}
    for index, fd in enumerate(fds):
        pid = os.fork()
        if not pid:
            report.close()
            _be_rank(fd, [other for other in fds if other != fd], run)
        living[pid] = index
    for fd in fds:
        os.close(fd)
    os._exit(_watch_over(living, report))  # taking torch down in good order is slow, and nothing here needs it


def _be_rank(fd: int, others: Sequence[int], run: Callable[[int], int]) -> NoReturn:
    """Does not return."""
    status = 1
    try:
        for other in others:
            os.close(other)
        status = run(fd)
    except BaseException:  # noqa: BLE001  (a rank must never go on as a second nursery)
        traceback.print_exc()
    finally:
        os._exit(status)


def _watch_over(living: dict[int, int], report: socket.socket) -> int:
    failed, kill_at, killed = False, float("inf"), False
    while living:
        pid, status = os.waitpid(-1, 0 if kill_at == float("inf") else os.WNOHANG)
        if not pid:
            if time.monotonic() > kill_at:
                kill_at, killed = float("inf"), True
                for other in living:
                    os.kill(other, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
            continue
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):  # the server is gone; the ranks know
            report.sendall(frame(Ended(living.pop(pid), code, put_down=killed)))
        if kill_at == float("inf") or (code and not failed):
            kill_at = time.monotonic() + (LAST_WORDS_SECONDS if code else LEAVE_SECONDS)
        failed = failed or code != 0
    return int(failed)
