"""engine/process/worker.py and engine/process/messages.py without a process: the loop, the frames, the last words."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l4core import errors
from l4core.config import EngineConfig
from l4core.engine.inbox import Inbox
from l4core.engine.process import worker
from l4core.engine.process.messages import (
    Failed,
    Log,
    Ready,
    Refused,
    Start,
    Stepped,
    Submit,
    ToServer,
    decode_for_engine,
    decode_for_server,
    frame,
)
from l4core.errors import CapacityError, EngineDeadError, L4Error, RequestError
from l4core.parallel.wire import HEADER, read_frame
from l4core.request import FinishReason, Request, SamplingParams, SequenceUpdate, StepOutput, StepStats, TokenLogprobs


def request(name: str, prompt: list[int] | None = None, **params: object) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3] if prompt is None else prompt,
        params=SamplingParams(seed=2**64 - 1, **params),  # type: ignore[arg-type]
        eos_token_ids=[7],
        max_total_tokens=99,
        priority=-4,
    )


class Counting:
    """Each request takes `length` steps."""

    def __init__(self, length: int = 2) -> None:
        self.length, self.left, self.inboxes = length, dict[str, int](), list[Inbox]()

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def check(self, request: Request) -> object:
        if request.params.sampler == "bad":
            raise RequestError("no such sampler", param="sampler", code="x")
        return None

    def step(self, inbox: Inbox) -> StepOutput:
        self.inboxes.append(inbox)
        self.left |= {r.request_id: self.length for r in inbox.requests}
        for name in inbox.aborts:
            self.left.pop(name)
        self.left = {name: n - 1 for name, n in self.left.items() if n > 1}
        return StepOutput(stats=StepStats(num_running=len(self.left)))


@dataclasses.dataclass
class Built:
    engine: Counting
    report: tuple[str, ...] = ("model  x",)
    folder: Path = Path("/nowhere")
    context_length: int = 77
    drafts: None = None


class Server:
    """The server's end of the socket, with an engine in a thread."""

    def __init__(self, engine: Counting) -> None:
        self.sock, self._theirs = socket.socketpair()
        self.engine = engine
        self.status: int | None = None
        self.orphaned = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self.status = worker.serve(
            self._theirs,
            lambda config: Built(self.engine),
            orphaned=self.orphaned.set,
            forward_logs=lambda send, level: None,
        )
        with contextlib.suppress(OSError):  # the other end is closed already
            self._theirs.shutdown(socket.SHUT_WR)  # not closed: the mailbox may still be reading

    def close(self) -> None:
        self.sock.close()
        self.thread.join()
        self._theirs.close()

    def send(self, *messages: Start | Submit) -> None:
        self.sock.sendall(b"".join(map(frame, messages)))

    def receive(self) -> ToServer | None:
        payload = read_frame(self.sock)
        return None if payload is None else decode_for_server(payload)

    def start(self) -> None:
        self.send(Start(config=EngineConfig(model="x"), log_level=20))
        assert isinstance(self.receive(), Ready)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(Counting())
    yield made
    made.close()


def test_start_is_answered_with_what_was_built(server: Server) -> None:
    server.send(Start(config=EngineConfig(model="x"), log_level=20))
    assert server.receive() == Ready(report=["model  x"], folder="/nowhere", context_length=77)


def test_an_idle_engine_is_not_stepped(server: Server) -> None:
    server.start()
    server.send(Submit.of(Inbox(requests=[request("a")])))
    first, second = server.receive(), server.receive()
    assert isinstance(first, Stepped)
    assert isinstance(second, Stepped)
    assert [s.output.stats.num_running for s in (first, second)] == [1, 0]
    server.send(Submit.of(Inbox(requests=[request("b")])))
    assert all(isinstance(server.receive(), Stepped) for _ in range(2))
    assert [len(inbox.requests) for inbox in server.engine.inboxes] == [
        1,
        0,
        1,
        0,
    ]  # none while there was nothing to do


def test_a_target_sends_what_steps_cost_with_each_inbox(server: Server) -> None:
    server.send(Start(config=EngineConfig(model="x", itl_target_ms=25.0), log_level=20))
    assert isinstance(server.receive(), Ready)
    server.send(Submit.of(Inbox(requests=[request("a")])))
    assert all(isinstance(server.receive(), Stepped) for _ in range(2))
    costs = [inbox.step_costs for inbox in server.engine.inboxes]
    assert [c.target_ms for c in costs if c is not None] == [25.0, 25.0]


def test_what_came_during_a_step_is_taken_in_together_and_in_order(server: Server) -> None:
    server.start()
    server.engine.length = 10**9
    a, b, c = request("a"), request("b", [4]), request("c", [])
    server.send(*(Submit.of(Inbox(requests=[r])) for r in (a, b, c)), Submit.of(Inbox(aborts=["a"])))
    while "a" in server.engine.left or len(server.engine.left) < 2:
        assert server.receive() is not None
    taken = [r for inbox in server.engine.inboxes for r in inbox.requests]
    assert [dataclasses.replace(r, prompt_token_ids=list(r.prompt_token_ids)) for r in taken] == [
        dataclasses.replace(r, eos_token_ids=[7]) for r in (a, b, c)
    ]


def test_a_refused_request_goes_back_with_its_status_and_the_others_go_on(server: Server) -> None:
    server.start()
    server.send(Submit.of(Inbox(requests=[request("a", sampler="bad"), request("b")])))
    assert server.receive() == Refused(request_id="a", message="no such sampler", status=400, param="sampler", code="x")
    assert isinstance(server.receive(), Stepped)
    assert [r.request_id for r in server.engine.inboxes[0].requests] == ["b"]


def test_the_server_gone_ends_the_process_with_0(server: Server) -> None:
    server.start()
    server.engine.length = 10**9
    server.send(Submit.of(Inbox(requests=[request("a")])))
    assert server.receive() is not None
    server.sock.close()
    server.thread.join()
    assert server.status == 0
    assert server.orphaned.wait(5)


def test_an_exception_in_a_step_is_the_last_word_with_its_traceback(server: Server) -> None:
    server.start()
    server.send(Submit.of(Inbox(aborts=["nobody"])))  # Counting.step raises KeyError
    failed = server.receive()
    assert isinstance(failed, Failed)
    assert failed.kind == "KeyError"
    assert "in step" in failed.trace
    server.thread.join()
    assert server.status == 1


def test_garbage_from_the_server_is_the_last_word_too(server: Server) -> None:
    server.start()
    server.sock.sendall(HEADER.pack(3) + b"abc")
    failed = server.receive()
    assert isinstance(failed, Failed)
    assert failed.trace


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        (Failed(kind="CapacityError", message="too big", fix="less"), CapacityError),
        (Failed(kind="CapacityError", message="too big", trace="Traceback …"), EngineDeadError),
        (Failed(kind="KeyError", message="KeyError: 1", trace="Traceback …"), EngineDeadError),
        (Failed(kind="annotations", message="not a class"), EngineDeadError),
        (Failed(kind="RequestError", message="x"), L4Error),
    ],
)
def test_an_error_has_its_class_again_on_the_servers_side(failed: Failed, expected: type[L4Error]) -> None:
    error = failed.error()
    assert type(error) is expected
    assert failed.message in str(error)
    assert failed.trace in str(error)
    assert error.fix == failed.fix
    assert expected in vars(errors).values()


token_ids = st.lists(st.integers(0, 2**31), max_size=5)
scores = st.builds(
    TokenLogprobs,
    token_id=st.integers(0, 2**20),
    logprob=st.floats(allow_nan=False),
    rank=st.integers(1, 2**20),
    top=st.lists(st.tuples(st.integers(0, 2**20), st.floats(allow_nan=False)), max_size=3),
)
updates = st.builds(
    SequenceUpdate,
    request_id=st.text(max_size=5),
    new_token_ids=token_ids,
    logprobs=st.lists(scores, max_size=2),
    prompt_logprobs=st.lists(st.none() | scores, max_size=2),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | st.integers(0, 2**20),
    error=st.text(max_size=5),
)


@given(st.lists(updates, max_size=3), st.dictionaries(st.text(max_size=3), st.integers(0, 2**40), max_size=2))
def test_what_the_engine_says_arrives_unchanged(sent: list[SequenceUpdate], pages: dict[str, int]) -> None:
    output = StepOutput(updates=sent, stats=StepStats(pages_used=pages))
    assert decode_for_server(frame(Stepped(output=output))[HEADER.size :]) == Stepped(output=output)


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=4)), max_size=6), st.lists(st.text(), max_size=3))
def test_requests_arrive_unchanged_and_share_their_prompts(asked: list[tuple[int, str]], aborts: list[str]) -> None:
    prompts = [[1, 2], [1, 2], []]
    sent = Inbox(requests=[request(name, prompts[k], logit_bias={5: 0.5}) for k, name in asked], aborts=aborts)
    message = decode_for_engine(frame(Submit.of(sent))[HEADER.size :])
    assert isinstance(message, Submit)
    assert len(message.prompts) == len({k for k, _ in asked})
    received = message.inbox()
    assert received == sent
    for (k, _), r in zip(asked, received.requests, strict=True):
        assert all(
            (other.prompt_token_ids is r.prompt_token_ids)
            for (j, _), other in zip(asked, received.requests, strict=True)
            if j == k
        )


def test_log_records_become_messages() -> None:
    import logging

    sent: list[ToServer] = []
    worker.ForwardLogs(sent.append).handle(logging.LogRecord("l4core.x", 30, "", 0, "%d pages", (3,), None))
    assert sent == [Log(level=30, name="l4core.x", text="3 pages")]
