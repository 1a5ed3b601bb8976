"""A custom class that streams, and one that follows its client: items as they come, progress, an end when nobody waits."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtests.modes import MODES, start
from tests.support.client import dial, get, metric, post, post_json, request, until
from workers import tasks
from workers.settings import Settings
from workers.tasks.calls import TIMER_S, CallContext, Followed, followed
from workers.tasks.custom import Own

STREAMS = '''
import threading, time
from pathlib import Path
class Words:
    streams = True
    def check(self, inputs, parameters): return inputs.split()
    def __call__(self, inputs): return [self.items(words) for words in inputs]
    def items(self, words):
        for word in words:
            if word == "FAIL": raise RuntimeError("on purpose")
            yield word
class Endless(Words):
    """Says a number every hundredth of a second, and writes down when it is stopped."""
    def items(self, words):
        try:
            n = 0
            while True:
                yield n
                n += 1
                time.sleep(0.01)
        finally:
            Path(words[0]).write_text("closed")
class Floods(Words):
    def items(self, words):
        for n in range(10**9): yield "x" * 1000
class Many(Words):
    def items(self, words): yield from range(int(words[0]))
class Long:
    """Goes on until its client has left, or until the file is there that the input names."""
    def __call__(self, inputs, contexts):
        for path, context in zip(inputs, contexts):
            context.progress(0.4)
            while not context.cancelled and not Path(path).exists(): time.sleep(0.01)
            Path(path + ".end").write_text("cancelled" if context.cancelled else "done")
        return ["done"] * len(inputs)
class Forgets:
    def __call__(self, inputs): return [(word for word in text) for text in inputs]
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "streaming_models.py").write_text(STREAMS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def serve(name: str, mode: str = "thread", **settings: str) -> Any:
    return start(MODES[mode], {"MODEL": f"streaming_models:{name}", **settings})


def lines(body: bytes) -> list[Any]:
    return [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("mode", ["thread", "process", "gthread-1x8", "asgi"])
def test_items_are_lines_or_events_or_one_list(mode: str) -> None:
    with serve("Words", mode) as server:
        reply = post(server, "one two three")
        assert reply.headers["Content-Type"] == "application/x-ndjson"
        assert lines(reply.body) == ["one", "two", "three"]
        events = post(server, "one two", Accept="text/event-stream")
        assert (events.headers["Content-Type"], events.body) == (
            "text/event-stream",
            b'data: "one"\n\ndata: "two"\n\n',
        )
        assert post(server, "one two", Accept="application/json").json == ["one", "two"]
        assert post_json(server, {"inputs": ["one two", "three"]}).json == [["one", "two"], ["three"]]


def test_an_error_has_its_status_before_the_first_item_and_is_the_last_line_after_it() -> None:
    with serve("Words") as server:
        assert post(server, "FAIL").status == 500
        reply = post(server, "one FAIL two")
        first, last = lines(reply.body)
        assert (reply.status, first, last["status"]) == (200, "one", 500) and "X-Request-ID" in last["error"]
        assert server.log().count("RuntimeError: on purpose") >= 2
        assert lines(post(server, "one").body) == ["one"]


def test_items_come_as_they_are_made_and_a_client_that_leaves_ends_them(tmp_path: Path) -> None:
    end = tmp_path / "end"
    with serve("Endless", DEADLINE_S="600") as server:
        with httpx.stream("POST", server.url, content=str(end), timeout=30) as reply:
            numbers = reply.iter_lines()
            assert [next(numbers) for _ in range(3)] == ["0", "1", "2"]
            assert not end.exists()
        until(end.exists)
        until(lambda: metric(server, "model_running") == 0)


def test_a_deadline_ends_the_items_with_a_line(tmp_path: Path) -> None:
    end = tmp_path / "end"
    with serve("Endless") as server:
        reply = post(server, str(end), Prefer="wait=0.5")
        *numbers, last = lines(reply.body)
        assert numbers == list(range(len(numbers))) and last["status"] == 504
        until(end.exists)


def test_a_model_process_ends_endless_items_at_the_deadline(tmp_path: Path) -> None:
    with serve("Endless", "process", DEADLINE_S="0.5") as server:
        assert post(server, str(tmp_path / "end")).status == 504
        until((tmp_path / "end").exists)
        assert "starting another" not in server.log(), "it was not killed"


def test_a_client_that_reads_too_slowly_does_not_fill_the_memory() -> None:
    with serve("Floods", BODY_TIMEOUT_S="1", DEADLINE_S="600") as server:
        with httpx.stream("POST", server.url, content="a", timeout=30) as reply:
            next(reply.iter_lines())
            until(lambda: metric(server, "model_running") == 0)
        assert server.memory_mb() < 400


def test_clients_that_reset_their_streams_leave_no_traceback() -> None:
    with serve("Floods", "gthread-1x8", DEADLINE_S="600") as server:
        for _ in range(10):
            with dial(server) as connection:
                connection.sendall(request("POST", "/", b"a", Accept="text/event-stream"))
                connection.recv(1000)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: get(server, "/health").json["running"] == 0)
        assert "Traceback" not in server.log()


def test_many_items_at_once_all_arrive() -> None:
    with serve("Many") as server:
        assert lines(post(server, "20000").body) == list(range(20_000))


def test_a_class_sees_that_its_client_has_left_and_its_progress_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "go"
    with serve("Long", DEADLINE_S="600") as server:
        with httpx.stream(
            "POST", server.url, content=str(path), headers={"Accept": "text/event-stream"}, timeout=30
        ) as reply:
            events = reply.iter_lines()
            assert [next(events), next(events)] == ["event: progress", "data: 0.4"]
            assert get(server, "/live").json["progress"] == [0.4]
        until(lambda: (end := tmp_path / "go.end").exists() and end.read_text() == "cancelled")
        path.touch()
        assert post(server, str(path)).json == "done"
        assert (tmp_path / "go.end").read_text() == "done" and get(server, "/live").json["progress"] == []
        assert "Traceback" not in server.log()


def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> Iterator[Any]:
    monkeypatch.syspath_prepend(tmp_path)
    return tasks.make(Settings(MODEL=f"streaming_models:{name}"))  # type: ignore[return-value]


def test_a_generator_without_streams_is_told_what_to_set(tmp_path: Path, monkeypatch: Any) -> None:
    model = make(monkeypatch, tmp_path, "Forgets").load(0)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="set streams = True in the class"):
        model(["a"])


def test_streams_without_a_generator_is_told(monkeypatch: Any) -> None:
    class Wrong:
        streams = True

        def __call__(self, inputs: list[Any]) -> list[Any]:
            return inputs

    with pytest.raises(TypeError, match="an answer is str; it must be a generator"):
        Own(Wrong(), "Wrong")([Followed("a", CallContext(), True)])


def test_a_context_is_cancelled_by_its_deadline_and_when_its_request_ends() -> None:
    context = CallContext()
    with followed([Followed("a", context), "another"], 60.0):
        assert not context.cancelled and 59 < context.deadline - time.monotonic() <= 60
    assert context.cancelled
    with followed([Followed("a", late := CallContext())], -TIMER_S):
        assert late.cancelled


def test_an_answer_that_the_deadline_cuts_short_is_never_taken_for_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server's own timer comes first; where it does not, as with OFFLOAD=inline, the model has failed."""
    clock = [0.0]
    monkeypatch.setattr("workers.tasks.calls.time.monotonic", lambda: clock[0])

    class Slow:
        streams = True

        def __call__(self, inputs: list[Any]) -> list[Any]:
            return [self.items(n) for n in inputs]

        def items(self, n: int) -> Iterator[int]:
            for i in range(n):
                yield i
                clock[0] += 0.99

    def items(n: int, client_left: bool = False) -> list[Any]:
        clock[0] = 0.0
        context = CallContext()
        context.deadline, context.has_left = 1.0, client_left
        return Own(Slow(), "Slow")([Followed(n, context, True)])

    assert items(1) == [[0]]
    with pytest.raises(TimeoutError, match="the deadline has passed before the last item"):
        items(9)
    assert items(9, client_left=True) == [[]]
    context = CallContext()
    context.deadline, clock[0] = 1.0, 1.1
    assert not context.cancelled, "else it could end as if it were whole before it is late"
    clock[0] += TIMER_S
    assert context.cancelled


def test_progress_is_from_0_to_1() -> None:
    context = CallContext()
    for said, shown in [(-1, 0.0), (0.25, 0.25), (7, 1.0)]:
        context.progress(said)
        assert context.fraction == shown
