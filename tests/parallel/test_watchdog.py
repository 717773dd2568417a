"""The watchdog of one rank, with the test as the other rank."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from l4core.parallel import rendezvous, watchdog
from l4core.parallel.messages import Beat, Hello, Words, decode, encode
from l4core.parallel.place import Place
from l4core.parallel.rendezvous import Met
from l4core.parallel.watchdog import Watchdog
from l4core.parallel.wire import HEADER, framed, read_frame

TIMEOUT = 1.0
"""Seconds. A loaded machine may keep this thread waiting for some tenths of one."""


class Watched:
    """Rank 0's watchdog; `other` is rank 1's end of the connection."""

    def __init__(self) -> None:
        self.ours, self.other = socket.socketpair()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.ended: list[Words] = []
        self.over = threading.Event()
        met = Met(
            place=Place(size=2, timeout=TIMEOUT),
            steps={},
            beats={1: self.ours},
            hosts={},
            store_host="",
            store_port=0,
            listener=self.listener,
        )
        self.watchdog = Watchdog(met, self._end)
        self.watchdog.start()

    def _end(self, words: Words) -> None:
        self.ended.append(words)
        self.over.set()

    def beat(self, step: int = 0, *, busy: bool = False) -> None:
        self.other.sendall(framed(encode(Beat(step, busy))))

    def verdict(self) -> str:
        assert self.over.wait(60)
        return self.ended[0].message


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.watchdog.stop()
    made.watchdog.join()
    for sock in (made.ours, made.other, made.listener):
        sock.close()


def test_it_gives_signs_of_life(watched: Watched) -> None:
    payload = read_frame(watched.other)
    assert payload is not None
    assert decode(payload) == Beat(0, False)


def test_a_rank_that_beats_is_let_be_and_one_that_is_silent_is_missed(watched: Watched) -> None:
    until = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < until:
        watched.beat()
        assert not watched.ended
        time.sleep(TIMEOUT / 10)
    assert watched.verdict() == f"rank 1 was not heard of for {TIMEOUT:g} s"


def test_a_rank_that_ends_is_missed_at_once_and_its_words_go_before(watched: Watched) -> None:
    watched.other.sendall(framed(encode(Words("CheckpointError", "rank 1: no such file", "look"))))
    watched.other.close()
    assert watched.verdict() == "rank 1: no such file"
    assert watched.ended[0].kind == "CheckpointError"


def test_a_closed_connection_is_an_end(watched: Watched) -> None:
    watched.other.close()
    assert watched.verdict() == "rank 1 ended"


def test_the_other_ranks_hear_why(watched: Watched) -> None:
    watched.beat()
    watched.verdict()
    said = []
    while (payload := read_frame(watched.other)) is not None and not isinstance(said[-1:], Words):
        said.append(decode(payload))
        if isinstance(said[-1], Words):
            break
    assert said[-1] == watched.ended[0]


def test_a_step_that_does_not_end_is_a_hang_and_who_is_not_in_it_is_named(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Signs of life go on: it is the step that stands still."""
    monkeypatch.setattr(watchdog, "HANG_FACTOR", 2)
    with watched.watchdog.step():
        while not watched.over.wait(TIMEOUT / 10):
            watched.beat(0)
    assert watched.verdict().startswith(f"rank 0 has been in step 1 for {2 * TIMEOUT:g} s; not in it: rank 1")
    assert "test_a_step_that_does_not_end" in capfd.readouterr().err


def test_a_rank_that_was_started_anew_is_a_rank_that_ended(watched: Watched) -> None:
    watched.beat()
    hello = Hello(rank=1, size=2, nonce="x", host="h", identity={})
    with socket.create_connection(watched.listener.getsockname()) as sock:
        sock.sendall(framed(encode(hello)))
        assert watched.verdict() == "rank 1 was started anew"


def test_a_stranger_is_not(watched: Watched) -> None:
    guess = encode(Hello(rank=1, size=2, nonce="x", host="h", identity={}, secret="guessed"))
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", framed(b"\xc1"), b"", framed(guess)):
        with socket.create_connection(watched.listener.getsockname()) as sock:
            sock.sendall(rubbish)
    watched.beat()
    time.sleep(TIMEOUT / 2)
    assert not watched.ended


def test_strangers_who_say_little_or_nothing_keep_nobody_from_beats(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that stays open and silent, and one that goes on bringing a byte at a time."""
    monkeypatch.setattr(rendezvous, "HANDSHAKE_SECONDS", 600.0)
    over = threading.Event()
    watched.other.settimeout(60)
    with contextlib.ExitStack() as strangers:
        _silent, slow = (
            strangers.enter_context(socket.create_connection(watched.listener.getsockname())) for _ in range(2)
        )
        slow.sendall(HEADER.pack(1 << 16))
        drops = threading.Thread(target=_drip, args=(slow, over))
        drops.start()
        for _ in range(8):
            watched.beat()
            assert isinstance(decode(read_frame(watched.other) or b""), Beat)
        assert not watched.ended
        over.set()
        drops.join()


def _drip(sock: socket.socket, over: threading.Event) -> None:
    with contextlib.suppress(OSError):  # it was let go
        while not over.wait(TIMEOUT / 100):
            sock.sendall(b"\0")


def test_after_stop_nobody_is_missed(watched: Watched) -> None:
    watched.watchdog.stop()
    watched.other.close()
    time.sleep(1.5 * TIMEOUT)
    assert not watched.ended
