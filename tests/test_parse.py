"""How a body and its headers are read: whatever is sent ends in inputs, or in a 4xx whose sentence says what to send."""

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from workers.context import RequestContext
from workers.errors import Malformed
from workers.settings import Settings
from workers.tasks import fill_mask
from workers.tasks.common.text import check_parameters, number_rule
from workers.web import parsing

IMAGES = ("image/",)


def asking(**headers: str) -> RequestContext:
    """A request with these headers, written with _ for -."""
    raw = [(k.lower().replace("_", "-").encode(), v.encode("latin-1")) for k, v in headers.items()]
    return RequestContext(dict(raw), "an-id")


def read(body: bytes, media: tuple[str, ...] = (), **headers: str) -> parsing.ParsedBody:
    return parsing.parse(body, asking(**headers), media, max_inputs=4)


def read_json(body: str | bytes) -> parsing.ParsedBody:
    return read(body.encode() if isinstance(body, str) else body, Content_Type="application/json")


def refused(body: str | bytes, **headers: str) -> tuple[int, str]:
    """The status and the sentence."""
    headers = headers or {"Content_Type": "application/json"}
    with pytest.raises(HTTPException) as caught:
        read(body.encode() if isinstance(body, str) else body, **headers)
    assert 400 <= caught.value.status_code < 500
    assert "send" in caught.value.detail, "it says what to send"
    return caught.value.status_code, caught.value.detail


# --- JSON -------------------------------------------------------------------------------------------------------------

WRONG_JSON = {
    "nothing": "",
    "a number": "1",
    "a list": "[]",
    "no inputs": "{}",
    "inputs that are null": '{"inputs": null}',
    "no input in the list": '{"inputs": []}',
    "too many inputs": '{"inputs": [1, 2, 3, 4, 5]}',
    "parameters that are a list": '{"inputs": 1, "parameters": [1]}',
    "a list without an end": '{"inputs": ["a"',
    "a comment": '{"inputs": "a"} // b',
    "two objects": '{"inputs": "a"} {"inputs": "b"}',
    "single quotes": "{'inputs': 'a'}",
    "NaN": '{"inputs": NaN}',
    "-Infinity": '{"inputs": [-Infinity]}',
    "more than a float can say": '{"inputs": 1e999}',
    "an integer of 5,000 digits": '{"inputs": ' + "1" * 5000 + "}",
    "depth": '{"inputs": ' + "[" * 8000 + "]" * 8000 + "}",
    "depth that Python itself still reads": '{"inputs": ' + "[" * 500 + "]" * 500 + "}",
    "depth in objects": '{"inputs":' * 1600 + "1" + "}" * 1600,
    "a field twice": '{"inputs": "a", "inputs": "b"}',
    "a field twice, further down": '{"inputs": {"a": 1, "a": 2}}',
    "a field twice whose name is half a character": '{"\\ud800": 1, "\\ud800": 2}',
    "half a character": '{"inputs": "\\ud83d"}',
    "half a character in a field's name": '{"inputs": 1, "\\uDC00": 2}',
    "a raw NUL": '{"inputs": "a\0b"}',
    "a raw line break": '{"inputs": "a\nb"}',
}


@pytest.mark.parametrize("what", WRONG_JSON)
def test_json_that_is_wrong_is_a_400(what: str) -> None:
    status, sentence = refused(WRONG_JSON[what])
    assert status == 400
    assert len(sentence) < 200


def test_last_of_many_keys_is_found_to_be_double_by_one_look_at_each() -> None:
    """A look at all keys before each would take minutes, on the event loop."""

    class Key(str):
        __slots__ = ()
        hashed = 0

        def __hash__(self) -> int:
            Key.hashed += 1
            return str.__hash__(self)

    keys: list[tuple[str, Any]] = [(Key(i), i) for i in range(1000)]
    with pytest.raises(HTTPException, match='duplicate key "500" in the JSON object; send it once'):
        parsing.unique([*keys, (Key(500), 0), (Key(1000), 0)])
    assert Key.hashed <= 4 * len(keys)


def test_double_key_is_shown_as_text_can_have_it() -> None:
    assert refused(WRONG_JSON["a field twice whose name is half a character"])[1].startswith(
        'duplicate key "?" in'
    )


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be", "latin-1"])
def test_json_that_is_not_utf_8_is_a_400(encoding: str) -> None:
    assert refused('{"inputs": "ä"}'.encode(encoding))[0] == 400


@pytest.mark.parametrize(
    "inputs", ["", " ", "a\0b", "ä難😀", 0, 10**100, 1.5, True, {"a": {"b": None}}, {"inputs": [1]}]
)
def test_whatever_json_can_say_reaches_the_task_as_it_is(inputs: Any) -> None:
    for text in (json.dumps({"inputs": inputs}), json.dumps({"inputs": inputs}, ensure_ascii=False)):
        assert read_json(text) == ([inputs], {}, False)


def test_list_is_several_inputs_be_they_lists_or_null() -> None:
    assert read_json('{"inputs": [[]]}') == ([[]], {}, True)
    assert read_json('{"inputs": ["a"]}') == (["a"], {}, True)
    assert read_json('{"inputs": [null, {}]}') == ([None, {}], {}, True)


def test_parameters_may_stand_beside_the_inputs_and_null_is_none() -> None:
    asked = read_json('{"inputs": "a", "top_k": 1, "seed": null, "parameters": {"x": 2, "targets": null}}')
    assert asked.parameters == {"top_k": 1, "x": 2}
    assert read_json('{"inputs": "a", "parameters": null}').parameters == {}


def test_parameter_that_says_two_things_is_rejected() -> None:
    with pytest.raises(HTTPException, match='422: "top_k" is given both'):
        read_json('{"inputs": "a", "top_k": 1, "parameters": {"top_k": 2}}')


def test_whole_number_is_one_however_it_is_written() -> None:
    assert check_parameters({"top_k": 2.0}, {"top_k": number_rule(1, 5)}) == {"top_k": 2}
    with pytest.raises(Malformed):
        check_parameters({"top_k": 2.5}, {"top_k": number_rule(1, 5)})


def test_byte_order_mark_is_not_part_of_the_body() -> None:
    assert read("a text".encode("utf-8-sig")).inputs == ["a text"]
    assert read_json('{"inputs": "a text"}'.encode("utf-8-sig")).inputs == ["a text"]


HEADERS = st.sampled_from(
    ["", "text/plain", "application/json", "application/json;", "image/png", ";;=;", 'a/b;charset="', "\xff"]
) | st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=40)
JSON_LIKE = st.text('[]{}",:\\u0dN1eE-+. \ud800ainputs', max_size=40).map(
    lambda text: text.encode(errors="surrogatepass")
)


@given(
    body=st.binary(max_size=60) | JSON_LIKE | JSON_LIKE.map(lambda inner: b'{"inputs":' + inner + b"}"),
    content_type=HEADERS,
    media=st.sampled_from([(), IMAGES]),
)
def test_any_bytes_end_in_inputs_or_a_4xx(body: bytes, content_type: str, media: tuple[str, ...]) -> None:
    try:
        asked = read(body, media, Content_Type=content_type)
    except HTTPException as exc:
        assert 400 <= exc.status_code < 500
    else:
        assert 1 <= len(asked.inputs) <= 4
        if not isinstance(asked.inputs[0], bytes):
            json.dumps(asked, allow_nan=False, ensure_ascii=False).encode()


# --- media types ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "TEXT/PLAIN",
        "text/plain;charset=utf-8",
        'text/plain; charset="utf-8"',
        'text/plain; Charset="UTF-8"; format=flowed',
        "text/plain; charset=us-ascii",
        "text/plain; charset=",
        'text/plain; title="; charset=latin-1"',
        "text/plain;;",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
    ],
)
def test_text_is_taken_whatever_its_type_is_called(content_type: str) -> None:
    assert read("ä".encode(), Content_Type=content_type) == (["ä"], {}, False)


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain; charset=latin-1",
        'text/plain; charset="latin-1"',
        'application/json; x="a\\"; charset=utf-8"; charset=utf-16',
        "multipart/form-data; boundary=x",
        "text/html",
        "application/xml",
        "text/json",
        "image/png",
        "text/plain, text/plain",
        "x" * 60_000,
    ],
)
def test_other_types_and_charsets_are_a_415(content_type: str) -> None:
    status, sentence = refused('{"inputs": "a"}', Content_Type=content_type)
    assert status == 415
    assert len(sentence) < 200


def test_encoded_body_is_a_415() -> None:
    assert refused("a", Content_Encoding="gzip")[0] == 415
    assert read(b"a", Content_Encoding="Identity").inputs == ["a"]


def test_task_that_takes_images_gets_their_bytes_and_others_read_of_them() -> None:
    jpeg = b"\xff\xd8\xff\xe0"
    for content_type in ("image/jpeg", "", "application/octet-stream", "application/x-www-form-urlencoded"):
        assert read(jpeg, IMAGES, Content_Type=content_type) == ([jpeg], {}, False)
    with pytest.raises(HTTPException, match=r"send text/plain or application/json or image/\*"):
        read(jpeg, IMAGES, Content_Type="audio/flac")
    with pytest.raises(HTTPException, match="empty"):
        read(b"", IMAGES, Content_Type="image/jpeg")
    assert read(b'{"inputs": "aGk="}', IMAGES, Content_Type="application/json").inputs == ["aGk="]


# --- Prefer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefer", "wait_s"),
    [
        ("wait=5", 5),
        ("Wait = 0.5", 0.5),
        ('wait="5"', 5),
        ("respond-async, wait=5", 5),
        ("respond-async,wait=5;x=1", 5),
        ('foo="a, b", wait=5', 5),
        ("wait=1, wait=5", 1),
        ("wait=0", 0),
        ("wait=0.5s", math.inf),
        ("wait=-1", math.inf),
        ("wait=", math.inf),
        ("wait", math.inf),
        ('wait="0', math.inf),
        ("wait=٣", math.inf),
        ('foo="a, wait=0"', math.inf),
        (r'foo="\", wait=0"', math.inf),
        ('foo="a, wait=0', math.inf),
        ("respond-async; wait=0", math.inf),
        ("await=0", math.inf),
        ("wait=0 x", math.inf),
        ("", math.inf),
    ],
)
def test_prefer_is_read_as_its_rfc_has_it_or_ignored(prefer: str, wait_s: float) -> None:
    assert parsing.client_budget_s(prefer.encode()) == wait_s


def test_header_twice_is_one_only_with_one_value_and_never_the_host() -> None:
    json_twice = [(b"content-type", b"application/json")] * 2
    assert parsing.combined([*json_twice, (b"host", b"a")]) == {
        b"content-type": b"application/json",
        b"host": b"a",
    }
    for name in (b"content-type", b"authorization", b"x-api-key", b"origin", b"host"):
        with pytest.raises(HTTPException, match="two"):
            parsing.combined([(name, b"a"), (name, b"b")])
    with pytest.raises(HTTPException, match="two host"):
        parsing.combined([(b"host", b"a"), (b"host", b"a")])


def test_prefer_may_come_in_several_headers() -> None:
    headers = parsing.combined([(b"prefer", b"wait=5"), (b"prefer", b"respond-async")])
    assert parsing.client_budget_s(headers[b"prefer"]) == 5


@pytest.mark.parametrize("piece", ['"', '\\"', '"\\', ",", "wait", "; ", ";a", ";a=", " "])
def test_no_header_takes_long_to_read(piece: str) -> None:
    """A pattern that goes back and forth would take minutes."""
    long = piece * (parsing.MAX_HEADER_BYTES // len(piece))
    began = time.process_time()
    parsing.client_budget_s(long.encode())
    parsing.charset_of("text/plain" + long)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "content_type", ["", "application/x-www-form-urlencoded", "application/octet-stream"]
)
def test_json_object_with_inputs_is_json_without_a_content_type(content_type: str) -> None:
    """As `curl -d '{"inputs": …}'` sends it: its text would get an answer, too, and nobody would notice."""
    body = b' {"parameters": {"top_k": 1}, "inputs": ["a", "b"]}'
    for media in ((), IMAGES):
        parsed = read(body, media, Content_Type=content_type)
        assert (parsed.inputs, parsed.parameters, parsed.is_list) == (["a", "b"], {"top_k": 1}, True)
    for wrong in (b'{"inputs": []}', b'{"inputs": "a", "inputs": "b"}', b'{"inputs": NaN}'):
        assert refused(wrong, Content_Type=content_type)[0] == 400


@pytest.mark.parametrize("text", ['{"input": "a"}', '{"inputs": "a"', '["inputs"]', '{"inputs"}', "{" * 9999])
def test_text_that_is_not_such_an_object_is_a_text(text: str) -> None:
    assert read(text.encode()).inputs == [text]


def test_text_stays_a_text_where_it_says_so() -> None:
    text = '{"inputs": "a"}'
    assert read(text.encode(), Content_Type="text/plain").inputs == [text]


# --- what the embedded task's parameters may be -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def task() -> fill_mask.Task:
    return fill_mask.Task(Settings())


@pytest.mark.parametrize(
    "parameters",
    [
        {"top_k": True},
        {"top_k": "3"},
        {"top_k": 3.5},
        {"top_k": 0},
        {"top_k": 101},
        {"targets": []},
        {"targets": [""]},
        {"targets": ["city", " "]},
        {"targets": [1]},
        {"targets": {"city": 1}},
    ],
)
def test_parameters_of_the_wrong_kind_are_rejected(task: fill_mask.Task, parameters: dict[str, Any]) -> None:
    with pytest.raises(Malformed, match="must be"):
        task.check("Paris is the [MASK] of France.", parameters)
