"""The gRPC APIs of a chaotic run: a question's texts as one tensor by ModelInfer, or each as a request of one stream.

The client's own deadline goes with the hurried ones only: of the others one sees whether the server keeps its own.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from loadtests.chaos.clients import DEADLINE_S, HUNG, LOST, SHUT, SLACK_S, TWICE, Question, Reply
from workers.protocols.open_inference import tensors

MODEL = "loadtests.chaos.model:Model"
STATUSES = {"INVALID_ARGUMENT": 422, "RESOURCE_EXHAUSTED": 503, "UNAVAILABLE": 503, "DEADLINE_EXCEEDED": 504, "INTERNAL": 500}  # fmt: skip
OPTIONS = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own


async def by_call(stub: Any, question: Question, timeout_s: float | None) -> Reply:
    reply = await stub.ModelInfer(message(question.texts, "all"), timeout=timeout_s)
    return right(said(reply, "all"), question)


async def by_stream(stub: Any, question: Question, timeout_s: float | None) -> Reply:
    """Each text once; of those that failed, what the first was told."""
    requests = (message([text], str(number)) for number, text in enumerate(question.texts))
    found: dict[str, Any] = {}
    async for reply in stub.ModelStreamInfer(a_stream(requests), timeout=timeout_s):
        if reply.infer_response.id in found:
            return Reply(trouble=TWICE)
        found[reply.infer_response.id] = reply
    replies = [found.pop(str(number), None) for number in range(len(question.texts))]
    if found or None in replies:
        return Reply(body=b"of a stream's answers", trouble=TWICE if found else LOST)
    for reply in replies:
        if reply.error_message:
            status = reply.infer_response.parameters["status"].string_param
            return wrong(status, reply.error_message)
    return right([said(reply.infer_response, str(n))[0] for n, reply in enumerate(replies)], question)


Asking = Callable[[Any, Question, float | None], Awaitable[Reply]]


async def over_grpc(asking: Asking, address: str, question: Question) -> Reply:
    """Ask it on a connection of its own; never raises."""
    leaves = question.leaves_after_s is not None
    patience_s = question.leaves_after_s if leaves else question.deadline_s + 3 * SLACK_S
    timeout_s = question.deadline_s if question.deadline_s < DEADLINE_S else None
    try:
        async with (
            asyncio.timeout(patience_s),
            grpc.aio.insecure_channel(address, options=OPTIONS) as channel,
        ):
            return await asking(GRPCInferenceServiceStub(channel), question, timeout_s)
    except TimeoutError:
        return Reply(trouble=HUNG)
    except grpc.aio.AioRpcError as error:
        return failed(error)


async def a_stream(requests: Iterable[Any]) -> Any:
    for request in requests:
        yield request


def message(texts: Iterable[str], request_id: str) -> Any:
    data = [text.encode() for text in texts]
    tensor = {"name": "text", "datatype": "BYTES", "shape": [len(data)], "contents": {"bytes_contents": data}}
    return pb.ModelInferRequest(model_name=MODEL, id=request_id, inputs=[tensor])


def said(reply: Any, request_id: str) -> list[Any]:
    """The answers; those to another request are none."""
    (raw,) = reply.raw_output_contents
    answers = [json.loads(one) for one in tensors.split(raw, len(raw))]
    return answers if reply.id == request_id else [None] * len(answers)


def right(answers: list[Any], question: Question) -> Reply:
    return Reply(200, json.dumps(answers if isinstance(question.content, list) else answers[0]).encode())


def wrong(code: str, sentence: str) -> Reply:
    return Reply(STATUSES.get(code, 0), json.dumps({"error": sentence}).encode())


def failed(error: grpc.aio.AioRpcError) -> Reply:
    """What the server said, which has its id of the call; or what the client's library says in its place."""
    code, sentence = error.code().name, error.details() or ""
    if code == "DEADLINE_EXCEEDED" or "x-request-id" in dict(error.trailing_metadata() or ()):
        return wrong(code, sentence)
    # CANCELLED: grpc's server ends so the calls that it has not yet taken up when it stops.
    shut = code == "CANCELLED" or "failed to connect" in sentence or "reset" in sentence
    trouble = SHUT if shut else LOST
    return Reply(body=f"{code}: {sentence}".encode(), trouble=trouble)
