"""OpenAI's transcriptions, by its own client: what the pipeline says of the sound, in each of the client's formats."""

import asyncio
import io
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import requests
import torch
import transformers

from loadtests.modes import MODES, Server, start
from tests.support import small_media
from workers.errors import Malformed
from workers.protocols import transcriptions
from workers.tasks.common import media
from workers.web import parsing
from workers.web.checks import CheckThreads

SOUND = media.example_sound(1, 25.0)
LONG = media.example_sound(4, 40.0)
TASK = "automatic-speech-recognition"


class Served:
    """A server, its client, and the plain pipeline."""

    def __init__(self, server: Server, folder: str) -> None:
        self.server = server
        self.client = openai.OpenAI(base_url=server.url + "v1", api_key="none", max_retries=0)
        self.pipe = transformers.pipeline(TASK, model=folder, device="cpu", dtype=torch.float32)

    def ask(self, sound: bytes = SOUND, **fields: Any) -> Any:
        return self.client.audio.transcriptions.create(
            model="any", file=("a.wav", io.BytesIO(sound)), **fields
        )

    def expected(self, sound: bytes = SOUND, **parameters: Any) -> Any:
        return self.pipe(media.read_sound(sound, 16_000, 60.0), **parameters)


def served(name: str, folder: Any) -> Iterator[Served]:
    small_media.MODELS[name][1](folder)
    with start(MODES["thread"], {"MODEL": str(folder), "TASK": TASK}) as server:
        yield Served(server, str(folder))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served("whisper", tmp_path_factory.mktemp("whisper"))


@pytest.fixture(scope="module")
def ctc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from served("ctc", tmp_path_factory.mktemp("ctc"))


@pytest.mark.parametrize("sound", [SOUND, LONG], ids=["short", "of two windows"])
def test_whisper_says_what_its_pipeline_says(whisper: Served, sound: bytes) -> None:
    text = whisper.expected(sound)["text"]
    assert text and whisper.ask(sound).text == text
    assert whisper.ask(sound, response_format="text") == text.strip() + "\n"
    german = whisper.expected(sound, generate_kwargs={"language": "de"})["text"]
    assert whisper.ask(sound, language="de", temperature=0).text == german


def test_whisper_gives_segments_with_their_times_and_the_language_that_it_heard(whisper: Served) -> None:
    expected = whisper.expected(return_timestamps=True, return_language=True)["chunks"]
    reply = whisper.ask(response_format="verbose_json")
    times = [(one.text, one.start, one.end) for one in reply.segments]
    assert times == [
        (one["text"], one["timestamp"][0] or 0.0, one["timestamp"][1] or 25.0) for one in expected
    ]
    assert (reply.duration, reply.language) == (25.0, expected[0]["language"]) and reply.language


def test_whisper_translates(whisper: Served) -> None:
    reply = whisper.ask(extra_body={"task": "translate"})
    assert reply.text == whisper.expected(generate_kwargs={"task": "translate"})["text"]


def test_subtitles(whisper: Served) -> None:
    expected = whisper.expected(return_timestamps=True)["chunks"]
    cues = whisper.ask(response_format="srt").split("\n\n")
    assert len(cues) == len(expected) and cues[0].startswith("1\n00:00:")
    assert whisper.ask(response_format="vtt").startswith("WEBVTT\n\n00:00:")
    assert transcriptions.clock(3723.4567, ",") == "01:02:03,457"


def test_words_of_a_ctc_model(ctc: Served) -> None:
    expected = ctc.expected(return_timestamps="word")
    reply = ctc.ask(response_format="verbose_json", timestamp_granularities=["word"])
    assert reply.text == expected["text"]
    assert [(one.word, one.start, one.end) for one in reply.words] == [
        (one["text"].strip(), *one["timestamp"]) for one in expected["chunks"]
    ]
    windows = {"chunk_length_s": 1, "stride_length_s": 0.1}
    assert ctc.ask(extra_body=windows).text == ctc.expected(**windows)["text"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"response_format": "srt"}, "this model has words but no segments; ask for verbose_json, not srt"),
        ({"response_format": "xml"}, '"response_format" must be json or text or verbose_json or srt or vtt'),
        ({"language": "de"}, '"language" is not a known field; leave it out'),
        ({"temperature": 0.7}, '"temperature" must be 0, or left out'),
        ({"timestamp_granularities": ["word"]}, '"timestamp_granularities[]" needs "response_format"'),
        ({"prompt": "Once"}, '"prompt" is not a known field'),
    ],
)
def test_what_the_model_does_not_have_is_a_400_in_openais_form(
    ctc: Served, fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ctc.ask(**fields)
    assert sentence in caught.value.body["message"]


def test_a_sound_that_cannot_be_read_and_a_body_that_is_not_a_form(ctc: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="the sound cannot be read"):
        ctc.ask(b"garbage")
    reply = requests.post(ctc.server.url + "v1/audio/transcriptions", json={"file": "a"})
    assert (reply.status_code, "send a form" in reply.json()["error"]["message"]) == (415, True)
    assert next(iter(ctc.client.models.list())).id.startswith("ctc")


def test_fields_of_a_form_are_parsed_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be 32 MB of JSON."""
    load_json, threads = parsing.load_json, []

    def watched(text: str, example: str) -> Any:
        threads.append(threading.current_thread())
        return load_json(text, example)

    monkeypatch.setattr(parsing, "load_json", watched)
    form = requests.Request(
        "POST", "http://x/", files={"file": SOUND}, data={"response_format": "xml"}
    ).prepare()

    async def read(request: Any) -> Any:
        return form.body

    async def ask() -> None:
        service = SimpleNamespace(checks=CheckThreads(), task=None, in_flight=SimpleNamespace(read=read))
        headers = [(b"content-type", form.headers["Content-Type"].encode())]
        asked: Any = SimpleNamespace(state=SimpleNamespace(service=service), scope={"headers": headers})
        with pytest.raises(Malformed, match="response_format"):
            await transcriptions.transcriptions(asked)
        service.checks.stop()

    asyncio.run(ask())
    assert threads and threading.main_thread() not in threads
