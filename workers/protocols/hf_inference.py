"""Hugging Face hosted inference, for its clients: POST /hf-inference, the same as POST / but for the lines below.

    client = huggingface_hub.InferenceClient(model="http://127.0.0.1:8000/hf-inference")
    client.text_classification("a text")           all labels: [[{"label": …, "score": …}, …]]; the pipeline: the likeliest
    client.zero_shot_classification("a text", […])  [{"label": …, "score": …}, …]; the pipeline: an object of lists

POST / answers as the pipeline does: of that, these clients would take the first label, or raise an error.
"""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from workers import tasks
from workers.protocols.openapi import asking, bodies
from workers.service import Service
from workers.settings import Settings
from workers.web import replies
from workers.web.generation import streamed


def routes(settings: Settings) -> list[Route]:
    return [Route("/hf-inference", answer, methods=["POST"])]


def operations(service: Service) -> dict[str, Any]:
    description = service.task.describe()
    gives = f"{description.gives}, in the hosted form."
    return {
        "/hf-inference": {
            "post": asking(f"Ask the model: {description.takes}", gives, bodies(description, service))
        }
    }


async def answer(request: Request) -> Response:
    """POST /hf-inference: the model's answer to one input, or to each of a list, in the hosted form."""
    service: Service = request.state.service
    settings = service.settings
    task = "" if settings.is_custom else tasks.ALIASES.get(settings.TASK, settings.TASK)
    body = await service.in_flight.read(request)
    asked = await service.parse(request, body)
    if service.generation and not asked.is_list and asked.parameters.get("stream") is True:
        (query,) = await service.checked(request, asked, len(body))
        return streamed(service.generation, request, query.content)
    parameters = {"top_k": settings.MAX_TOP_K} if task == "text-classification" else {}
    answers, _ = await service.ask(request, asked.inputs, parameters | asked.parameters, len(body))
    values = [hosted(task, answer.value) for answer in answers]
    is_list = asked.is_list or task == "text-classification"
    return replies.AnswerResponse(answers, values if is_list else values[0])


def hosted(task: str, value: Any) -> Any:
    """Return an answer in the form that the clients read."""
    if task == "zero-shot-classification":
        return [{"label": label, "score": score} for label, score in zip(value["labels"], value["scores"])]
    return value
