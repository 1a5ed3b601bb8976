"""A web form as a body: `multipart/form-data` with one file, the input, and the parameters as its other fields.

    curl -F file=@cat.jpg -F top_k=3 http://127.0.0.1:8000/
    requests.post(url, files={"file": open("cat.jpg", "rb")}, data={"top_k": 3})

The file's field may have any name. A field's text that is JSON is that: 3, 0.5, true, ["a", "b"]; any other is itself. A name that
is there twice is a list.
"""

import io
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from starlette.exceptions import HTTPException

MEDIA_TYPE = "multipart/form-data"
MOST_PARTS = 128
MOST_FIELD_BYTES = 262_144
SEND = "send one file and the parameters, as `curl -F file=@NAME -F top_k=3` does"


class Form(NamedTuple):
    """A form with one file: its bytes, its name, and the texts of each other field."""

    file: bytes
    name: str
    fields: dict[str, list[str]]


def read(body: bytes, content_type: str) -> Form:
    """Return the form that the body is. Raises HTTPException 400 or 413 with a sentence that says what to send."""
    from werkzeug.exceptions import RequestEntityTooLarge  # 50 ms, and only forms need it
    from werkzeug.formparser import FormDataParser
    from werkzeug.http import parse_options_header

    parser = FormDataParser(
        in_memory,
        max_form_memory_size=MOST_FIELD_BYTES,
        max_form_parts=MOST_PARTS,
        silent=False,
    )
    try:
        options = parse_options_header(content_type)[1]
        _, fields, files = parser.parse(io.BytesIO(body), MEDIA_TYPE, len(body), options)
    except RequestEntityTooLarge:
        most = f"at most {MOST_PARTS} fields of at most {MOST_FIELD_BYTES} bytes"
        raise HTTPException(413, f"the form is too large; send one file and {most}") from None
    except ValueError:
        raise HTTPException(400, f"the form can't be read; {SEND}") from None
    # As the parser has a part without a name, whatever it is annotated with.
    if None in fields or None in files:
        raise HTTPException(400, f"the form has a part without a name; name it, and {SEND}")
    # A browser sends a file without a name and without bytes where none was chosen.
    found = [(file.read(), file.filename or "") for _, file in files.items(multi=True)]
    chosen = [file for file in found if any(file)]
    if len(chosen) != 1:
        raise HTTPException(400, f"the form has {len(chosen) or 'no'} files; {SEND}")
    return Form(*chosen[0], dict(fields.lists()))


def in_memory(
    total_content_length: int | None,
    content_type: str | None,
    filename: str | None,
    content_length: int | None = None,
) -> IO[bytes]:
    """Return where a file goes: the body has a bound, so nothing goes to the disk."""
    return io.BytesIO()


def parameters(form: Form, load: Callable[[str], Any]) -> dict[str, Any]:
    """Return the fields as parameters. `load` reads JSON; what it raises HTTPException for is a text.

    A field "parameters" with a JSON object is as many parameters, as in a JSON body.
    """

    def value(text: str) -> Any:
        try:
            return load(text)
        except HTTPException:
            return text

    values = {name: [value(text) for text in texts if text] for name, texts in form.fields.items()}
    found: dict[str, Any] = {
        name: some[0] if len(some) == 1 else some for name, some in values.items() if some
    }
    if isinstance(more := found.get("parameters"), dict):
        found = more | {name: one for name, one in found.items() if name != "parameters"}
    return {name: one for name, one in found.items() if one is not None}
