"""Which rank is where, from options and from torchrun's environment."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from l4core import LLM
from l4core.config import EngineConfig, ServerConfig
from l4core.errors import CheckpointError, ConfigError
from l4core.parallel.place import Layout, layouts, listening, split_address

TORCHRUN = {
    "RANK": "9",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


def layout(tp: int, environ: dict[str, str] | None = None, **server: Any) -> Layout:
    (made,) = layouts(EngineConfig(tp=tp, dist_timeout=7.0), ServerConfig(**server), environ or {})
    return made


def test_one_rank_is_alone() -> None:
    made = layout(1)
    assert (len(made.places), made.serves, made.listens, made.open()) == (1, True, False, None)


def test_ranks_of_one_machine_have_a_device_each_and_listen_on_the_loopback() -> None:
    made = layout(4)
    assert [(p.rank, p.size, p.device, p.num_local) for p in made.places] == [(r, 4, r, 4) for r in range(4)]
    with made.open() or pytest.fail("no socket") as listener:
        places = made.with_listener(listener)
        assert listener.getsockname()[0] == "127.0.0.1"
        assert {p.port for p in places} == {listener.getsockname()[1]}
        assert [p.listen_fd for p in places] == [listener.fileno(), None, None, None]


def test_machines_have_equal_shares() -> None:
    second = layout(16, nnodes=2, node_rank=1, dist_init_addr="10.0.0.1:5000")
    assert [(p.rank, p.device, p.machine, p.host, p.port) for p in second.places] == [
        (8 + i, i, 1, "10.0.0.1", 5000) for i in range(8)
    ]
    assert not second.serves
    assert not second.listens
    first = layout(16, nnodes=2, dist_init_addr="10.0.0.1:5000")
    assert first.serves
    assert first.listens


def test_torchrun_says_which_rank_this_is() -> None:
    (place,) = layout(16, TORCHRUN).places
    assert (place.rank, place.size, place.device, place.num_local, place.machine) == (9, 16, 1, 8, 1)
    assert (place.host, place.port, place.in_store, place.whole, place.timeout) == ("node0", 29500, True, False, 7.0)


def test_another_launcher_that_keeps_no_store_lets_rank_0_listen() -> None:
    environ = {**TORCHRUN, "RANK": "0"}
    del environ["TORCHELASTIC_USE_AGENT_STORE"]
    made = layout(16, environ)
    assert made.listens
    assert not made.places[0].in_store


@pytest.mark.parametrize(
    ("tp", "environ", "server", "text"),
    [
        (8, TORCHRUN, {}, r"torchrun started 16 processes \(WORLD_SIZE\), and --tp is 8"),
        (8, {**TORCHRUN, "WORLD_SIZE": "many"}, {}, "WORLD_SIZE in the environment is 'many'; wanted a number"),
        (16, TORCHRUN, {"nnodes": 2, "dist_init_addr": "x:1"}, "do not go with torchrun"),
        (9, {}, {"nnodes": 2, "dist_init_addr": "x:1"}, "--tp 9 ranks on --nnodes 2 machines"),
        (8, {}, {"nnodes": 2, "dist_init_addr": "10.0.0.1"}, "wanted HOST:PORT"),
        (
            8,
            {},
            {"nnodes": 2, "node_rank": 1, "dist_init_addr": "0.0.0.0:1"},
            "every address of a machine, and none to go",
        ),
    ],
)
def test_numbers_that_do_not_fit(tp: int, environ: dict[str, str], server: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        layout(tp, environ, **server)


@pytest.mark.parametrize(
    ("server", "text"),
    [
        ({"nnodes": 2}, "--nnodes 2 without --dist-init-addr"),
        ({"node_rank": 1}, r"--node-rank is 1; wanted 0 … 0"),
        ({"dist_init_addr": "10.0.0.1:29500"}, "is for several machines, and --nnodes is 1"),
    ],
)
def test_options_of_machines_that_do_not_fit(server: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        ServerConfig(**server)


def test_under_torchrun_an_engine_in_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its processes would start all ranks. One alone is as if there were no torchrun, and so is an engine of one rank."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"one of 16 \(WORLD_SIZE\), and LLM\(tp=2\) starts its ranks itself"
    ) as caught:
        LLM("nowhere", tp=2, device="cpu")
    assert "unset RANK" in caught.value.fix
    for world, tp in (("1", 2), ("16", 1)):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(CheckpointError):
            LLM("/nowhere", tp=tp, device="cpu")


def test_an_address_that_is_not_this_machines_is_said() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen at 203\.0\.113\.1:5000"):
        layout(2, nnodes=2, dist_init_addr="203.0.113.1:5000").open()


@pytest.mark.parametrize(
    ("text", "parts"),
    [("host:1", ("host", 1)), ("[::1]:29500", ("::1", 29500)), ("tcp://10.0.0.1:65535", ("10.0.0.1", 65535))],
)
def test_addresses(text: str, parts: tuple[str, int]) -> None:
    assert split_address(text) == parts


def test_a_name_that_means_the_loopback_here_is_listened_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """But only where other machines are to come."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    for name, reachable, address in (
        ("node0", True, "0.0.0.0"),
        ("node0", False, "127.0.1.1"),
        ("localhost", True, "127.0.1.1"),
    ):
        with listening(name, 0, reachable=reachable) as sock:
            assert sock.getsockname()[0] == address
