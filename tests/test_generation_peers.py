"""Text generation beside other servers: the client that times pieces, what is counted, and what keeps the page honest."""

import asyncio
import json
from itertools import repeat
from pathlib import Path

import pandas as pd
import pytest

from loadtests.compare import generation as modes
from loadtests.load.token_streams import Goal, Readers, Stream, goodput, text_of, throughput
from loadtests.modes import ROOT
from loadtests.peers.catalogue import FOLDER
from loadtests.peers.environments import requirements
from loadtests.peers.generation import __main__ as generation
from loadtests.peers.generation import report
from loadtests.peers.generation.catalogue import WRITERS, Writer
from loadtests.peers.generation.visit import longest_gap

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
needs_chat = pytest.mark.skipif(
    not (ROOT / "models" / "chat" / "config.json").exists(), reason="`make chat` makes the model"
)


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text}]}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def read(*parts: bytes, patience_s: float = 5.0, hangs: bool = False) -> Stream:
    """What a reader gets from a server that sends these parts in packets of their own."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0)
        if hangs:
            await reader.read()
        writer.close()

    async def run() -> Stream:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Readers(f"http://127.0.0.1:{port}/").read("Paris", 4, patience_s=patience_s)

    return asyncio.run(run())


def test_event_that_comes_in_two_packets_is_one_piece() -> None:
    whole = chunk(event("a")) + chunk(event(" b"))
    stream = read(HEAD, whole[:30], whole[30:], chunk(b"data: [DONE]\n\n"), b"0\r\n\r\n")
    assert [piece for _, piece in stream.pieces] == ["a", " b"]
    assert stream.is_whole and stream.status == 200 and stream.ttft_s < 5.0


@pytest.mark.parametrize("end", [b"", b"garbage"], ids=["closed", "garbage"])
def test_stream_without_its_end_is_not_whole(end: bytes) -> None:
    stream = read(HEAD, chunk(event("a")), end)
    assert stream.text == "a" and not stream.is_whole


def test_reader_leaves_a_server_that_writes_no_more() -> None:
    stream = read(HEAD, chunk(event("a")), patience_s=0.05, hangs=True)
    assert stream.text == "a" and not stream.is_whole


def test_rejection_is_counted_as_one() -> None:
    stream = read(BUSY)
    assert stream.status == 503 and not stream.is_whole
    found = goodput([stream], Goal(), stream.due_at, stream.due_at + 1.0)
    assert found["rejected"] == 1.0 and found["good_per_s"] == 0.0


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'data: {"choices": [{"text": "a"}]}', "a"),
        (b'{"choices": [{"text": "a"}]}\r', "a"),
        (b'data: {"choices": [], "usage": {}}', ""),
        (b"data: [DONE]", ""),
        (b": still waiting", ""),
        (b'data: {"error": {"message": "it failed"}}', ""),
    ],
)
def test_text_is_taken_out_of_a_line(line: bytes, text: str) -> None:
    assert text_of(line) == text


def stream(*at: float, due_at: float = 0.0, is_whole: bool = True) -> Stream:
    return Stream("a prompt", due_at, [(one, "word ") for one in at], 200, is_whole)


@pytest.mark.parametrize(
    ("one", "is_good"),
    [
        (stream(0.9, 1.0, 1.1), True),
        (stream(1.1, 1.2), False),
        (stream(0.5, 0.8), False),
        (stream(0.5, 0.6, is_whole=False), False),
        (stream(is_whole=False), False),
    ],
    ids=["in time", "late first", "long gap", "cut", "nothing"],
)
def test_text_is_good_when_each_piece_is_in_time_and_it_ends(one: Stream, is_good: bool) -> None:
    assert one.is_good(Goal(ttft_s=1.0, itl_s=0.2)) is is_good


def test_goodput_counts_those_that_were_due_in_the_time() -> None:
    due = [stream(0.1, due_at=0.0), stream(1.5, due_at=1.0), stream(3.5, due_at=1.5), stream(2.1, due_at=2.0)]
    found = goodput(due, Goal(), 1.0, 2.0)
    assert (found["offered_per_s"], found["good_per_s"], found["late_first"]) == (2.0, 1.0, 0.5)


def test_throughput_counts_the_tokens_of_the_time() -> None:
    def words(text: str) -> int:
        return len(text.split())

    assert throughput([stream(0.5, 1.0, 1.5, 3.0), stream(2.9)], words, 1.0, 3.0) == 1.5


def test_longest_gap_begins_with_the_last_piece_before_and_ends_with_the_time() -> None:
    assert longest_gap(stream(0.0, 1.0, 1.5), 1.2, 3.0) == 1.5
    assert longest_gap(stream(0.0, 1.0, 2.9), 1.2, 3.0) == pytest.approx(1.9)


def test_closed_loop_asks_again_when_a_text_has_ended() -> None:
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"\r\n\r\n")
        asked += 1
        if asked > 5:
            await reader.read()
        else:
            writer.write(HEAD + chunk(event("a")) + b"0\r\n\r\n")
        writer.close()

    async def run() -> list[Stream]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await Readers(f"http://127.0.0.1:{port}/").closed(2, 0.5, ["a", "b"], repeat(3))

    streams = asyncio.run(run())
    assert sum(one.is_whole for one in streams) == 5 and len(streams) == 7


OTHERS = [writer for writer in WRITERS.values() if not writer.is_ours]


@pytest.mark.parametrize("name", sorted({name for writer in OTHERS for name in writer.code}))
def test_program_of_a_server_is_short_and_names_the_page_that_it_follows(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 75
    assert "https://" in text.split('"""')[1]


@pytest.mark.parametrize("writer", OTHERS, ids=lambda writer: writer.name)
def test_every_version_of_a_server_is_pinned(writer: Writer) -> None:
    assert all("==" in line for line in requirements(writer))


def rows(**tokens_per_s: float) -> pd.DataFrame:
    found = [
        (name.replace("_", " "), "float32", "readers 8", "tokens_per_s", value)
        for name, value in tokens_per_s.items()
    ]
    return pd.DataFrame(found, columns=["server", "kind", "what", "metric", "value"])


def test_page_names_each_server_that_is_faster_and_each_that_failed(tmp_path: Path) -> None:
    rows(this_server=100.0, vllm=120.0, litserve=20.0).to_csv(tmp_path / "generation.csv", index=False)
    about = {"date": "today", "processor": "P", "cores": 2, "pinning": "apart", "python": "3", "versions": {}}
    about["failed"] = {"openvino-genai, float32": "it wrote nothing"}
    (tmp_path / "generation.json").write_text(json.dumps(about))
    report.write(tmp_path)
    text = (tmp_path / "generation.md").read_text()
    assert "- float32, tokens/s, 8 readers: vllm 120; this server 100" in text
    assert "- openvino-genai, float32: it wrote nothing" in text
    assert max(line.count(" | ") for line in text.splitlines() if line.startswith("| ")) < 6


@pytest.mark.slow
@needs_chat
def test_this_server_answers_as_generate_does_and_its_speed_and_goodput_are_rows(tmp_path: Path) -> None:
    servers = ["this server", "this server, 24 sequences"]
    command = ["--quick", "--servers", *servers, "--kinds", "float32", "--out", str(tmp_path)]
    assert generation.main(command) == 0
    found = pd.read_csv(tmp_path / "generation.csv").set_index(["server", "what", "metric"])["value"]
    assert found["this server", "answers together", "equal"] == 8
    assert found["this server", "readers 8", "tokens_per_s"] > 0
    assert found["this server", "after 8 left", "cpu_s"] < found["this server", "after 8 left", "of_s"] / 2
    assert found["this server, 24 sequences", "at 2 x", "offered_per_s"] > 0
    assert "Goodput" in (tmp_path / "generation.md").read_text()


@pytest.mark.slow
@needs_chat
def test_mode_that_streams_is_measured_in_quick_form(tmp_path: Path) -> None:
    assert modes.main(["--quick", "--modes", "thread", "--out", str(tmp_path)]) == 0
    found = pd.read_csv(tmp_path / "generation-modes.csv").set_index(["what", "metric"])["value"]
    assert found["readers 8", "tokens_per_s"] > 0 and found["at 2 x", "offered_per_s"] > 0
    assert "| thread |" in (tmp_path / "generation-modes.md").read_text()
