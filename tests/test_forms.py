"""Web forms, multipart/form-data: a file and its parameters, from every client that sends one, in every deployment mode."""

import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import sync_playwright
from starlette.exceptions import HTTPException

from loadtests.modes import MODES, Server, start
from tests.support import small_media
from tests.support.browser import CHROMIUM, in_browser
from workers import tasks
from workers.context import RequestContext
from workers.errors import Malformed
from workers.settings import Settings
from workers.tasks.common.media import example_image
from workers.web import forms, parsing

FINGERPRINT = """
import hashlib
class Fingerprint:
    media = ("image/",)
    def check(self, inputs, parameters): return hashlib.sha256(inputs).hexdigest(), parameters
    def __call__(self, inputs): return [{"sha": sha, **parameters} for sha, parameters in inputs]
"""
DATA = bytes(range(256)) * 300 + b"\r\n--x--\r\n--"  # no text, longer than a part that is read at once
SHA = hashlib.sha256(DATA).hexdigest()
FIELDS = {"top_k": "3", "threshold": "0.5", "pool": "true", "language": "de", "labels": '["a", "b"]'}
VALUES = {"top_k": 3, "threshold": 0.5, "pool": True, "language": "de", "labels": ["a", "b"]}


@pytest.fixture(autouse=True)
def fingerprint(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "fingerprint.py").write_text(FINGERPRINT)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return {"MODEL": "fingerprint:Fingerprint"}


def encoded(data: bytes = DATA, fields: Any = (), **files: Any) -> tuple[bytes, str]:
    """A form as httpx writes it."""
    request = httpx.Request("POST", "http://x/", data=dict(fields), files=files or {"file": data})
    return request.read(), request.headers["Content-Type"]


def read(body: bytes, content_type: str) -> parsing.ParsedBody:
    context = RequestContext({b"content-type": content_type.encode("latin-1")}, "an-id")
    return parsing.parse(body, context, ("image/",), max_inputs=4)


def rejected(body: bytes, content_type: str) -> tuple[int, str]:
    with pytest.raises(HTTPException) as caught:
        read(body, content_type)
    assert "send" in caught.value.detail
    return caught.value.status_code, caught.value.detail


@pytest.mark.parametrize(
    "mode", [name for name in MODES if not name.endswith("-stock") and name != "uvicorn-2"]
)
def test_form_is_a_file_and_parameters_in_every_mode(mode: str, fingerprint: dict[str, str]) -> None:
    with start(MODES[mode], fingerprint) as server:
        expected = {"sha": SHA, **VALUES}
        assert requests.post(server.url, files={"file": DATA}, data=FIELDS).json() == expected
        assert httpx.post(server.url, files={"picture": ("a.png", DATA)}, data=FIELDS).json() == expected
        assert httpx.post(server.url, files={"file": DATA}, data={}).json() == {"sha": SHA}


def test_curl_and_its_limits(fingerprint: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(DATA)
    with start(MODES["thread"], {**fingerprint, "MAX_BODY_BYTES": "100000"}) as server:
        curl = ["curl", "-s", "-F", f"file=@{tmp_path}/cat.jpg", "-F", "top_k=3", server.url]
        assert json.loads(subprocess.check_output(curl)) == {"sha": SHA, "top_k": 3}
        reply = requests.post(server.url, files={"file": DATA * 2})
        assert (reply.status_code, reply.json()["error"][:25]) == (413, "the body is too large; se")


@pytest.fixture
def page_server(fingerprint: dict[str, str]) -> Iterator[Server]:
    with start(MODES["thread"], fingerprint) as server:
        yield server


@in_browser
def test_form_of_a_browser(page_server: Server, tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(DATA)
    form = """<form method=post enctype=multipart/form-data action=/>
        <input type=file name=file><input name=top_k value=3><input name=empty><button>Send</button></form>"""
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page()
        page.route("**/form.html", lambda route: route.fulfill(body=form, content_type="text/html"))
        page.goto(page_server.url + "form.html")
        page.get_by_role("button", name="Send").click()
        assert "the form has no files; send one file" in (page.locator("body").text_content() or "")
        page.go_back()
        page.locator("input[type=file]").set_input_files(tmp_path / "cat.jpg")
        page.get_by_role("button", name="Send").click()
        assert json.loads(page.locator("body").text_content() or "") == {"sha": SHA, "top_k": 3}
        browser.close()


@given(st.binary(min_size=1, max_size=3000))
def test_file_comes_byte_by_byte_as_it_was(data: bytes) -> None:
    assert read(*encoded(data, FIELDS)) == ([data], VALUES, False)


@given(st.binary(max_size=300), st.text(max_size=30))
def test_whatever_is_sent_is_read_or_rejected_with_a_sentence(data: bytes, boundary: str) -> None:
    for content_type in ("multipart/form-data; boundary=x", f"multipart/form-data; boundary={boundary!a}"):
        for body in (data, b"--x\r\n" + data, b"--x\r\nContent-Disposition: form-data; " + data):
            if body:
                rejected(body, content_type)


def test_form_that_is_cut_short_is_rejected() -> None:
    body, content_type = encoded()
    assert rejected(body[:-10], content_type)[0] == rejected(body[:50_000], content_type)[0] == 400


def test_form_has_one_file_and_a_bounded_number_of_fields() -> None:
    assert rejected(*encoded(file=DATA, other=DATA)) == (400, f"the form has 2 files; {forms.SEND}")
    assert rejected(*encoded(fields={f"f{i}": "1" for i in range(200)}))[0] == 413
    assert rejected(*encoded(fields={"labels": "a" * 300_000}))[0] == 413


@pytest.mark.parametrize(("kind", "value"), [("", "3"), ('; filename="a.png"', "x")], ids=["field", "file"])
def test_part_without_a_name_is_rejected_and_one_named_none_is_a_field(kind: str, value: str) -> None:
    file = 'Content-Disposition: form-data; name="file"; filename="b.png"\r\n\r\nx\r\n'

    def form(disposition: str) -> bytes:
        part = f"Content-Disposition: form-data{disposition}\r\n\r\n{value}\r\n"
        return f"--x\r\n{file}--x\r\n{part}--x--\r\n".encode()

    content_type = "multipart/form-data; boundary=x"
    status, sentence = rejected(form(kind), content_type)
    assert (status, sentence[:32]) == (400, "the form has a part without a na")
    assert read(form('; name="None"'), content_type).parameters == {"None": 3 if value == "3" else "x"}


def test_field_that_comes_twice_is_a_list_and_parameters_may_be_one_object() -> None:
    body, content_type = encoded(
        fields={"labels": ["a", "b"], "parameters": '{"top_k": 2, "pool": null}', "n": "NaN"}
    )
    assert read(body, content_type).parameters == {"labels": ["a", "b"], "top_k": 2, "n": "NaN"}


def test_task_of_texts_takes_no_form() -> None:
    body, content_type = encoded()
    context = RequestContext({b"content-type": content_type.encode()}, "an-id")
    with pytest.raises(HTTPException, match=r"is not supported; send text/plain or application/json$"):
        parsing.parse(body, context, (), max_inputs=4)


def test_question_to_a_document_is_a_field_of_its_form(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    task: Any = tasks.make(Settings(MODEL=str(tmp_path), TASK="document-question-answering"))
    image = example_image()
    query = task.check(image, {"question": "what is it?", "top_k": 2})
    assert query.content.inputs == {"image": image, "question": "what is it?"}
    assert query.content.parameters == {"top_k": 2}
    with pytest.raises(Malformed, match='"question" must be a text'):
        task.check(image, {})


def test_image_by_a_form_gets_the_answer_that_its_bytes_get(tmp_path: Path) -> None:
    small_media.vit(tmp_path)
    image = example_image()
    with start(MODES["thread"], {"MODEL": str(tmp_path), "TASK": "image-classification"}) as server:
        whole = requests.post(server.url, data=image, headers={"Content-Type": "image/png"}).json()
        assert requests.post(server.url, files={"file": image}, data={"top_k": 2}).json() == whole[:2]
        reply = requests.post(server.url, files={"file": image}, data={"top_k": "many"})
        assert (reply.status_code, "a whole number" in reply.json()["error"]) == (400, True)
