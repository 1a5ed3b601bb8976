"""The chaos suite sees what is wrong; and the short form of it finds nothing."""

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from loadtests.chaos.clients import KINDS, NOBODY, SLACK_S, Outcome, asked, good, kills
from loadtests.chaos.faults import Fault, nothing
from loadtests.chaos.grpc_clients import MODEL, by_call, by_stream, over_grpc
from loadtests.chaos.run import DEPLOYMENTS, Census, Run, Storm, Window, possible, report
from loadtests.chaos.texts import storm

CHANCE = random.Random(0)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s"
RIGHT = b'{"said":"0 doog","letters":6}'


def wrong_of(*pieces: bytes, then_waits: bool = False) -> str:
    """What is wrong with this reply to a good question, of a server that then closes the connection, or doesn't."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.writelines(pieces)
        if then_waits:
            await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        served.set()

    async def run() -> Outcome:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            question = good("0", CHANCE, **({"deadline_s": 0.1 - 3 * SLACK_S} if then_waits else {}))
            host, port = server.sockets[0].getsockname()
            outcome = await asked(f"http://{host}:{port}/", question)
            await served.wait()
        return outcome

    served = asyncio.Event()
    return asyncio.run(run()).verdict(may_fail=False, may_be=(), lag_s=60)


def test_each_wrong_end_of_a_request_is_reported() -> None:
    right = OK % (len(RIGHT), RIGHT)
    assert wrong_of(right) == ""
    assert wrong_of(right, right).startswith("more than one reply")
    assert wrong_of(right[:-1]).startswith("lost")
    assert wrong_of(b"").startswith("lost")
    assert wrong_of(then_waits=True) == "hung"
    assert wrong_of(OK % (len(RIGHT), RIGHT.replace(b"0", b"1"))) == "mixed up"
    error = b'{"error":"later"}'
    assert wrong_of(b"HTTP/1.1 503 No\r\ncontent-length: %d\r\n\r\n%s" % (len(error), error)) == ""
    assert wrong_of(b"HTTP/1.1 503 No\r\ncontent-length: 5\r\n\r\nlater") == "no JSON"
    assert (
        wrong_of(b"HTTP/1.1 500 No\r\ncontent-length: %d\r\n\r\n%s" % (len(error), error)) == "500, not 200"
    )


@pytest.mark.parametrize("how", [by_call, by_stream])
def test_each_wrong_end_of_a_grpc_call_is_reported(how: Any) -> None:
    def told(*replies: Any, code: grpc.StatusCode = grpc.StatusCode.OK, ours: bool = True) -> str:
        async def serve(requests: Any, context: Any) -> AsyncIterator[Any]:
            # A call that ends while the client still writes loses its status: grpc issue 36066.
            await anext(requests)
            for reply in replies:
                yield pb.ModelStreamInferResponse(infer_response=reply) if how is by_stream else reply
            if code is not grpc.StatusCode.OK:
                await context.abort(code, "later", (("x-request-id", "1"),) if ours else ())

        async def run() -> Outcome:
            server = grpc.aio.server()
            name = "ModelStreamInfer" if how is by_stream else "ModelInfer"
            handler = grpc.stream_stream_rpc_method_handler(
                serve, response_serializer=lambda m: m.SerializeToString()
            )
            handlers = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {name: handler})
            server.add_generic_rpc_handlers([handlers])
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            outcome = await asked(f"127.0.0.1:{port}", good("0", CHANCE), partial(over_grpc, how))
            await server.stop(0)
            return outcome

        return asyncio.run(run()).verdict(may_fail=False, may_be=(), lag_s=60)

    def answered(text: bytes, request_id: str = "0" if how is by_stream else "all") -> Any:
        raw = struct.pack("<I", len(text)) + text
        return pb.ModelInferResponse(model_name=MODEL, id=request_id, raw_output_contents=[raw])

    right = answered(RIGHT)
    assert told(right) == ""
    assert told(answered(RIGHT.replace(b"0", b"1"))) == "mixed up"
    assert told(code=grpc.StatusCode.UNAVAILABLE) == ""
    assert told(code=grpc.StatusCode.UNAVAILABLE, ours=False).startswith("lost")
    assert told(code=grpc.StatusCode.INTERNAL) == "500, not 200"
    if how is by_stream:
        assert told(right, right).startswith("more than one reply")
        assert told(right, answered(RIGHT, "1")).startswith("more than one reply")
        assert told().startswith("lost")
    else:
        assert told(answered(RIGHT, "other")) == "mixed up"


def test_error_is_excused_while_its_cause_lasts_and_no_longer() -> None:
    run = Run("any")
    death = Fault("a death", nothing, bool, may_fail=True)
    stop = Fault("a stop", nothing, bool, may_be=(NOBODY,))
    run.windows = [Window(death, 10, 11), Window(stop, 20, 21)]
    for at in (5, 10.5, 15, 20.5):
        run.outcomes.append(Outcome("good", at, at + 0.1, 500, "", "500, not 200"))
        run.outcomes.append(Outcome("good", at, at + 0.1, 0, NOBODY, NOBODY))
        run.outcomes.append(Outcome("good", at, at + 9, 200, "", "", over_s=6))
    run.judge()
    assert [defect for defect in run.defects if "500" in defect] == [
        "good at 5.0 s: 500, not 200 (amid: nothing)",
        "good at 15.0 s: 500, not 200 (amid: nothing)",
        "good at 20.5 s: 500, not 200 (amid: a stop)",
    ]
    assert sum(NOBODY in defect for defect in run.defects) == 3
    assert sum("late by" in defect for defect in run.defects) == 4
    assert (run.row()["lost"], run.row()["hung"], run.unheard) == (3, 4, 1)
    assert "- any: good at 5.0 s" in report([run], 1, 0)


def test_what_grows_is_a_leak() -> None:
    before = Census(2, 10, 20, 100)
    assert not Census(2, 10, 20, 130).leaks(before)
    assert len(Census(3, 30, 21, 200).leaks(before)) == 4


def test_same_seed_sends_the_same() -> None:
    first, second = (
        [kind(str(i), chance).raw for i, kind in enumerate([*KINDS] * 20)]
        for chance in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert kills("0", CHANCE).statuses == (500, 422)


@pytest.mark.slow
def test_short_storm_finds_nothing() -> None:
    """Under Gunicorn, with a model process, where it can be had without /dev/shm and on a disk of 1 MB."""
    name = "starved" if "starved" in possible() else "instances-2"
    assert DEPLOYMENTS[name].env["OFFLOAD"] == "process"
    run = asyncio.run(Storm(name, seconds=12, seed=1).weather())
    assert run.defects == []
    assert len(run.outcomes) > 500 and len(run.windows) > 3


@pytest.mark.slow
def test_texts_of_a_storm_are_right_and_the_servers_counts_are_the_clients(tmp_path: Path) -> None:
    from tests.support.small_language_models import save

    texts = storm(save(tmp_path, max_position_embeddings=2048), seconds=15, seed=1)
    assert texts.defects == []
    assert texts.whole > 20 and any(end == "left" for _, end in texts.ends)
