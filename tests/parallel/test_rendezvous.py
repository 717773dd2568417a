"""How ranks meet: threads of this process that stand for processes of one or several machines."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from helpers.ports import free_port
from l4core.errors import ConfigError, RankLostError
from l4core.parallel import rendezvous
from l4core.parallel.connect import Crew
from l4core.parallel.messages import Attach, Hello, Refusal, Waiting, decode, encode
from l4core.parallel.place import Place, local_layout
from l4core.parallel.rendezvous import ranks_text
from l4core.parallel.wire import framed, read_frame

Meet = Callable[..., "Future[Crew]"]
SAME = {"torch": "2.13.0"}


@pytest.fixture
def places() -> Iterator[tuple[Place, ...]]:
    layout = local_layout(3, 5.0)
    listener = layout.open()
    assert listener is not None
    yield layout.with_listener(listener)
    listener.detach()  # rank 0's crew has it


@pytest.fixture
def meet(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meet]:
    """meet(place, identity) → the crew to come; closed at the end."""
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 20.0)
    made: list[Future[Crew]] = []
    with ThreadPoolExecutor(8) as pool:

        def start(place: Place, identity: Mapping[str, str] = SAME) -> Future[Crew]:
            made.append(pool.submit(Crew, place, identity, lambda words: None))
            return made[-1]

        yield start
    for future in made:
        if future.exception() is None:
            close(future.result())


def close(crew: Crew) -> None:
    crew.watchdog.stop()
    crew.watchdog.join()
    for sock in [*crew.met.steps.values(), *crew.met.beats.values(), crew.met.store, crew.met.listener]:
        if sock is not None:
            sock.close()


def test_whoever_comes_first_waits_and_rank_0_reaches_all(places: tuple[Place, ...], meet: Meet) -> None:
    others = [meet(place) for place in places[1:]]
    time.sleep(0.05)
    lead = meet(places[0]).result()
    lead.send(b"one")
    for rank, future in enumerate(others, start=1):
        crew = future.result()
        assert crew.receive() == b"one"
        crew.send(b"from %d" % rank)
        assert lead.receive(rank) == b"from %d" % rank


@pytest.mark.parametrize(
    ("place", "identity", "text"),
    [
        ({}, {"torch": "2.12.0"}, "rank 2 and rank 0 differ: torch is 2.12.0 there, and 2.13.0 here"),
        ({}, {}, "rank 2 and rank 0 differ: torch is nothing there, and 2.13.0 here"),
        ({"size": 4}, SAME, "rank 2 counts 4 ranks, and rank 0 3"),
    ],
)
def test_a_rank_that_differs_is_refused_on_all(
    places: tuple[Place, ...], meet: Meet, place: dict[str, int], identity: dict[str, str], text: str
) -> None:
    crews = [meet(places[0]), meet(places[1])]
    with socket.create_connection(
        (places[0].host, places[0].port)
    ) as probe:  # until rank 1 is among those who hear of it
        probe.sendall(
            framed(encode(Hello(rank=2, size=3, nonce="x", host="h", identity=SAME, secret=places[0].secret)))
        )
        while decode(read_frame(probe) or b"") != Waiting([2]):
            pass
    crews.append(meet(replace(places[2], **place), identity))
    for crew in crews:
        with pytest.raises(ConfigError, match=text):
            crew.result()


def test_strangers_are_let_go_and_a_rank_that_was_started_anew_is_waited_for(
    places: tuple[Place, ...], meet: Meet
) -> None:
    crews = [meet(places[0])]
    address = (places[0].host, places[0].port)
    for rubbish in (b"GET / HTTP/1.1\r\n\r\n", framed(b"\xc1"), framed(encode(Attach(2, "unknown"))), b""):
        with socket.create_connection(address) as stranger:
            stranger.sendall(rubbish)
    with socket.create_connection(address) as other_user:
        other_user.sendall(framed(encode(Hello(rank=2, size=3, nonce="x", host="h", identity=SAME))))
        with contextlib.suppress(ConnectionResetError):
            assert read_frame(other_user) is None
    with socket.create_connection(address) as beats, socket.create_connection(address) as steps:
        beats.sendall(
            framed(encode(Hello(rank=2, size=3, nonce="x", host="h", identity=SAME, secret=places[0].secret)))
        )
        steps.sendall(framed(encode(Attach(2, "x"))))
        while decode(read_frame(beats) or b"") != Waiting([1]):
            pass
    crews.append(meet(places[1]))
    time.sleep(0.2)  # all are there, but for rank 2, which is no more
    crews.append(meet(places[2]))
    crews[0].result().send(b"!")
    assert crews[2].result().receive() == b"!"


def test_two_machines_with_one_number_are_named(
    places: tuple[Place, ...], meet: Meet, caplog: pytest.LogCaptureFixture
) -> None:
    crew = meet(places[0])
    with contextlib.ExitStack() as machines:
        for host in ("machine 1, a", "machine 1, b", "machine 1, a"):
            beats = machines.enter_context(socket.create_connection((places[0].host, places[0].port)))
            beats.sendall(
                framed(encode(Hello(rank=1, size=3, nonce="x", host=host, identity=SAME, secret=places[0].secret)))
            )
            assert decode(read_frame(beats) or b"") == Waiting([1, 2])
    for future in [meet(place) for place in places[1:]]:
        future.result()
    crew.result()
    (said,) = (record.getMessage() for record in caplog.records if "two places" in record.getMessage())
    assert said.startswith("rank 1 comes from two places, machine 1, a and machine 1, b: --node-rank")


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"host": "127.0.0.1"}, "--dist-init-addr 127.0.0.1:PORT, and let"),
        ({"host": "0.0.0.0"}, "--dist-init-addr HOST:PORT, HOST an address of this machine"),
        ({"host": "127.0.0.1", "whole": True}, "they are on this machine"),
    ],
)
def test_ranks_that_do_not_come_are_told_where_to(
    monkeypatch: pytest.MonkeyPatch, place: dict[str, Any], text: str
) -> None:
    """Whatever rank 0 listens at, the address is one that others can reach."""
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 0.0)
    monkeypatch.setattr(rendezvous, "TICK_SECONDS", 0.01)
    port = free_port()
    with pytest.raises(RankLostError, match="rank 1 did not come") as caught:
        rendezvous.meet(Place(**{"size": 2, "port": port, "whole": False, **place}), SAME)
    assert text.replace("PORT", str(port)) in caught.value.fix


def test_all_must_agree(places: tuple[Place, ...], meet: Meet) -> None:
    crews = [future.result() for future in [meet(place) for place in places]]
    with ThreadPoolExecutor(3) as pool:
        assert not any(pool.map(lambda crew: crew.agree({"checkpoint": "a"}), crews))
        asked = [pool.submit(crew.agree, {"checkpoint": "b" if crew.place.rank == 1 else "a"}) for crew in crews]
        for future in asked:
            with pytest.raises(ConfigError, match="rank 1 and rank 0 differ: checkpoint is b there, and a here"):
                future.result()


def test_a_rank_that_comes_again_hears_that_the_engine_is_complete(places: tuple[Place, ...], meet: Meet) -> None:
    """It is not answered: rank 0 ends, and the next one answers."""
    crews = [future.result() for future in [meet(place) for place in places]]
    with socket.create_connection((places[0].host, places[0].port)) as again, contextlib.suppress(OSError):
        again.sendall(
            framed(encode(Hello(rank=1, size=3, nonce="y", host="h", identity=SAME, secret=places[0].secret)))
        )
        again.settimeout(5)
        payload = read_frame(again)
        assert payload is None or isinstance(decode(payload), Refusal)
    assert len(crews) == 3


def test_ranks_in_words() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text([1, 2, 3, 6, 8, 9]) == "ranks 1–3, 6, 8–9"
