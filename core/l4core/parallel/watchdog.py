"""A thread beside each rank's work: tells the others that this one lives, and ends this one when another does not.

Rank 0 and every other rank watch each other; the other ranks hear of each other through rank 0. A rank that died closes its connection and is
missed at once; one that hangs, is stopped or has lost the network is missed after `timeout` seconds of silence; one whose step does not end (a
collective that waits for ever, on a GPU too) after `HANG_FACTOR` times that. Silence is counted in this thread's own looks, not on a clock: a
process that was stopped itself finds no fault with the others.
"""

from __future__ import annotations

import contextlib
import faulthandler
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from l4core.parallel.messages import MOST_BYTES, Beat, Hello, Words, decode, encode
from l4core.parallel.rendezvous import Met, first_message, is_ours
from l4core.parallel.wire import HEADER, framed

HANG_FACTOR = 10
LOOKS = 10
"""Within one time-out."""
LONGEST_LOOK_SECONDS = 1.0
LOST = "RankLostError"
TIMEOUT_FIX = "a larger --dist-timeout, where nothing was wrong"


def look_seconds(timeout: float) -> float:
    """Between two looks."""
    return min(LONGEST_LOOK_SECONDS, timeout / LOOKS)


class Watchdog:
    """One rank's. `start` it before the model is loaded, `stop` it before an end that is meant."""

    def __init__(self, met: Met, end: Callable[[Words], None], beat: Callable[[], None] = lambda: None) -> None:
        """end: called once, from the watchdog's thread, with the reason why this rank must end; it does not return.  beat: called at each look; it
        returns at once."""
        self._met, self._end, self._beat = met, end, beat
        self._look = look_seconds(met.place.timeout)
        self._most_looks = met.place.timeout / self._look
        self._peers = {rank: _Peer(met.name(rank), sock) for rank, sock in met.beats.items()}
        self._step, self._busy = 0, False
        self._seen_step, self._same_for = 0, 0
        self._stopped, self._verdict = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The engine ends on purpose: whoever goes now is not missed."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until its thread has seen that."""
        self._thread.join()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around each step of this rank."""
        self._step += 1
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def tell(self, words: Words) -> None:
        """This rank ends, and the others hear why."""
        for peer in self._peers.values():
            peer.send(words)

    def wait_for_verdict(self, seconds: float) -> None:
        """An error in a collective may only be the echo of another rank's end: give that time to be noticed. Does not return if it is."""
        if self._verdict.wait(seconds):
            threading.Event().wait()

    def _run(self) -> None:
        listener = self._met.listener
        waited_on = {peer.sock: peer for peer in self._peers.values()}
        due = time.monotonic() + self._look
        while not self._stopped.is_set():
            sockets = [*waited_on, *([] if listener is None else [listener])]
            readable, _, _ = select.select(sockets, [], [], max(0.0, due - time.monotonic()))
            problem = next(filter(None, (waited_on[sock].read() for sock in readable if sock in waited_on)), None)
            if listener is not None and listener in readable:
                problem = problem or self._newcomer(listener)
            if time.monotonic() >= due:
                due = time.monotonic() + self._look
                problem = problem or self._look_around()
            if problem is not None and not self._stopped.is_set():
                self._verdict.set()
                self.tell(problem)
                self._end(problem)
                return

    def _look_around(self) -> Words | None:
        """A sign of life to the others, and what is wrong with them or with the step that this rank is in."""
        self._beat()
        beat = Beat(self._step, self._busy)
        for peer in self._peers.values():
            peer.send(beat)
            peer.num_silent += 1
            if peer.num_silent > self._most_looks:
                return Words(LOST, f"{peer.name} was not heard of for {self._met.place.timeout:g} s", fix=TIMEOUT_FIX)
        self._same_for = self._same_for + 1 if beat.busy and beat.step == self._seen_step else 0
        self._seen_step = beat.step
        return self._hang(beat) if self._same_for > HANG_FACTOR * self._most_looks else None

    def _hang(self, own: Beat) -> Words:
        faulthandler.dump_traceback(all_threads=True)
        behind = [p.name for p in self._peers.values() if p.beat.step < own.step or not p.beat.busy]
        waits_for = f"; not in it: {', '.join(behind)}" if behind else ""
        return Words(
            LOST,
            f"{self._met.place} has been in step {own.step} for {HANG_FACTOR * self._met.place.timeout:g} s{waits_for}; where it hangs is on stderr",
            fix=TIMEOUT_FIX,
        )

    def _newcomer(self, listener: socket.socket) -> Words | None:
        """Someone connects to rank 0 of an engine that is complete: a rank that was started anew, before its end was noticed here."""
        try:
            sock, _ = listener.accept()
        except OSError:
            return None
        with sock:
            message = first_message(
                sock, self._look
            )  # a rank's comes at once; nobody else may keep this thread from its beats
        known = isinstance(message, Hello) and is_ours(message, self._met.place) and message.rank in self._peers
        return Words(LOST, f"{self._met.name(message.rank)} was started anew") if known else None  # type: ignore[union-attr]


class _Peer:
    """Another rank, by the connection for signs of life. name: for messages.  beat: its last."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.name, self.sock = name, sock
        self.num_silent = 0
        self.beat = Beat(0, False)
        self._received, self._unsent = bytearray(), b""
        sock.setblocking(False)

    def send(self, message: Beat | Words) -> None:
        """As much as the connection takes now: to a rank that does not read, a beat less matters not."""
        if len(self._unsent) < MOST_BYTES:
            self._unsent += framed(encode(message))
        with contextlib.suppress(OSError):  # full, or gone: reading tells
            self._unsent = self._unsent[self.sock.send(self._unsent) :]

    def read(self) -> Words | None:
        """Take in what came → why all must end, if it says so."""
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return None
        except OSError as error:
            return Words(LOST, f"{self.name} is cut off: {error.strerror or error}")
        if not data:
            return Words(LOST, f"{self.name} ended")
        self.num_silent = 0
        self._received += data
        try:
            return self._take()
        except msgspec.DecodeError as error:
            return Words(LOST, f"{self.name} sent something unreadable: {error}")

    def _take(self) -> Words | None:
        while len(self._received) >= HEADER.size:
            end = HEADER.size + HEADER.unpack_from(self._received)[0]
            if len(self._received) < end:
                return None
            message = decode(self._received[HEADER.size : end])
            del self._received[:end]
            if isinstance(message, Words):
                return message
            if isinstance(message, Beat):
                self.beat = message
        return None
