"""OpenAI transcriptions, where TASK=automatic-speech-recognition: POST /v1/audio/transcriptions.

    client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.audio.transcriptions.create(model="any", file=open("speech.mp3", "rb")).text

The body is a form. Any `model` means the one that is served. A sound is at most MAX_SOUND_S long; where Whisper needs several of
its windows of 30 s, each begins where the last one's speech ended, as in `generate`. Other fields are parameters of the task.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from workers import tasks
from workers.context import context_of
from workers.errors import Malformed, Unprocessable
from workers.protocols.openai import ERROR, error_body, model_list
from workers.protocols.openapi import STATUSES, an_object, asking, operation
from workers.service import Service
from workers.settings import Settings
from workers.tasks.common.text import schemas
from workers.web import forms, parsing
from workers.web.replies import AnswerResponse

__all__ = ["error_body", "operations", "routes"]

# What is not a parameter of the task.
FIELDS = {
    "file": "the sound: WAV, FLAC, MP3, Ogg, WebM and whatever else ffmpeg reads",
    "model": "any name: there is one model",
    "language": "such as `de`; Whisper finds it out by itself",
    "response_format": "`json`, `text`, `verbose_json`; with Whisper `srt` and `vtt`, too",
    "timestamp_granularities[]": "of `verbose_json`: `segment`, `word`",
    "temperature": "0 only: nothing is drawn",
    "stream": "false only",
}
FORMATS = ("json", "text", "verbose_json", "srt", "vtt")
GRANULARITIES = ("segment", "word")
UNCHANGEABLE = {"temperature": 0, "stream": False}


def routes(settings: Settings) -> list[Route]:
    if (
        tasks.ALIASES.get(settings.TASK, settings.TASK) != "automatic-speech-recognition"
        or settings.is_custom
    ):
        return []
    return [
        Route("/v1/audio/transcriptions", transcriptions, methods=["POST"]),
        Route("/v1/models", models),
    ]


def operations(service: Service) -> dict[str, Any]:
    task: Any = service.task
    granularities = {
        "anyOf": [{"enum": list(GRANULARITIES)}, {"type": "array", "items": {"enum": list(GRANULARITIES)}}]
    }
    optional = {
        **schemas(task.rules),
        "model": {},
        "response_format": {"enum": list(FORMATS)},
        "timestamp_granularities[]": granularities,
        **{name: {"const": value} for name, value in UNCHANGEABLE.items()},
    }
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    content = {forms.MEDIA_TYPE: {"schema": an_object({"file": file}, optional)}}
    asked = asking("Write down what is said", "The text.", content, ERROR)
    listed = operation("Models", {200: "An OpenAI list of the one model.", **STATUSES}, error=ERROR)
    return {"/v1/audio/transcriptions": {"post": asked}, "/v1/models": {"get": listed}}


async def models(request: Request) -> Response:
    """GET /v1/models: the model that is served."""
    return model_list(request.state.service)


async def transcriptions(request: Request) -> Response:
    """POST /v1/audio/transcriptions: what is said in a sound."""
    service: Service = request.state.service
    task: Any = service.task
    context = context_of(request.scope)
    body = await service.in_flight.read(request)
    parsing.reject_encoded(context)
    content_type = context.headers.get(b"content-type", b"").decode("latin-1")
    if content_type.partition(";")[0].strip().lower() != forms.MEDIA_TYPE:
        raise HTTPException(415, "send a form, multipart/form-data, with the sound as its file")
    read = partial(parsing.parse_form, body, content_type)
    inputs, fields, _ = await service.checks.run(context, len(body), read, 0)
    kind, words = wanted(fields)
    try:
        parameters = fields | timestamps(kind, words, task)
        asked = parsing.ParsedBody(inputs, parameters)
        (query,) = await service.checked(request, asked, len(body))
    except (Malformed, Unprocessable) as exc:
        raise Malformed(str(exc)) from exc  # it has no 422
    work = service.loop.submit_all([query.content], [query.size], budget_s=context.left_s)
    context.answers = await service.in_flight.unless_left(request, work)
    said, length_s = context.answers[0].value, task.seconds(query)
    if kind in WRITTEN:
        return PlainTextResponse(WRITTEN[kind](said, length_s))
    more = verbose(said, length_s, parameters) if kind == "verbose_json" else {}
    return AnswerResponse(context.answers, {"text": said["text"], **more})


def wanted(fields: dict[str, Any]) -> tuple[str, bool]:
    """Take from the form's fields what is not a parameter; return the format, and whether words have times. Raises Malformed."""
    fields.pop("model", None)
    kind = fields.pop("response_format", "json")
    if kind not in FORMATS:
        raise Malformed(f'"response_format" must be {" or ".join(FORMATS)}')
    for name, only in UNCHANGEABLE.items():
        if fields.pop(name, only) != only:
            raise Malformed(f'"{name}" must be {str(only).lower()}, or left out')
    given = fields.pop("timestamp_granularities[]", [])
    given = given if isinstance(given, list) else [given]
    if not set(map(str, given)) <= set(GRANULARITIES):
        raise Malformed('"timestamp_granularities[]" must be segment or word')
    if given and kind != "verbose_json":
        raise Malformed('"timestamp_granularities[]" needs "response_format": "verbose_json"')
    return kind, "word" in given


def timestamps(kind: str, words: bool, task: Any) -> dict[str, Any]:
    """Return the parameters that give the times that a format needs. Raises Malformed where the model has none."""
    if kind in ("json", "text"):
        return {}
    if "return_timestamps" not in task.rules:
        raise Malformed(f'this model has no timestamps; "response_format" must be json or text, not {kind}')
    if not task.is_whisper:
        if kind in ("srt", "vtt"):
            raise Malformed(f"this model has words but no segments; ask for verbose_json, not {kind}")
        return {"return_timestamps": "word"}
    language = {"return_language": True} if "return_language" in task.rules else {}
    return {"return_timestamps": "word" if words else True, **language}


def verbose(said: dict[str, Any], length_s: float, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return what `verbose_json` has beside the text."""
    languages = [chunk["language"] for chunk in said["chunks"] if chunk.get("language")]
    known = {
        "task": parameters.get("task", "transcribe"),
        "language": parameters.get("language") or (languages or [""])[0],
        "duration": round(length_s, 3),
    }
    times = timed(said, length_s)
    if parameters["return_timestamps"] == "word":
        return known | {
            "words": [{"word": text.strip(), "start": start, "end": end} for text, start, end in times]
        }
    segments = [
        {"id": i, "start": start, "end": end, "text": text} for i, (text, start, end) in enumerate(times)
    ]
    return known | {"segments": segments}


def timed(said: dict[str, Any], length_s: float) -> list[tuple[str, float, float]]:
    """Return each chunk's text, and when it begins and ends: with the sound where the model does not say."""
    times = [(chunk["text"], *chunk["timestamp"]) for chunk in said["chunks"]]
    return [(text, start or 0.0, length_s if end is None else end) for text, start, end in times]


def subtitles(said: dict[str, Any], length_s: float, mark: str, numbered: bool) -> str:
    """Return the segments as subtitles; `mark` stands before the milliseconds."""
    cues = []
    for number, (text, start, end) in enumerate(timed(said, length_s), 1):
        head = f"{number}\n" if numbered else ""
        cues.append(f"{head}{clock(start, mark)} --> {clock(end, mark)}\n{text.strip()}\n")
    return "\n".join(cues)


def clock(seconds: float, mark: str) -> str:
    """Return 01:02:03,456."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"


WRITTEN: dict[str, Callable[[dict[str, Any], float], str]] = {
    "text": lambda said, length_s: said["text"].strip() + "\n",
    "srt": lambda said, length_s: subtitles(said, length_s, ",", numbered=True),
    "vtt": lambda said, length_s: "WEBVTT\n\n" + subtitles(said, length_s, ".", numbered=False),
}
