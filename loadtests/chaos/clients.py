"""The clients of a chaotic run: what each sends, what is a right outcome for it, and which it got."""

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from loadtests.chaos.model import answer

DEADLINE_S, BODY_TIMEOUT_S, MAX_BODY_BYTES = 3.0, 2.0, 400_000
SLACK_S = 3.0  # beyond a deadline: the machine is shared, and so is the core of the clients
NOBODY, LOST, HUNG, TWICE = "nobody listened", "lost", "hung", "more than one reply"
SHUT = "nobody listened over gRPC"  # or took up the call: each worker has a socket of its own, which ends with it
LEAVES, LEFT = "leaves", "left"
UNHEARD = "reset"  # amid a stop: the system's queue of connections ends with the socket that listens


@dataclass(frozen=True)
class Question:
    """What a client sends, and what may come back. 503 and 504 always may."""

    kind: str
    raw: bytes
    statuses: tuple[int, ...] = (200,)
    content: Any = None  # of a 200
    deadline_s: float = DEADLINE_S
    leaves_after_s: float | None = None
    reads_after_s: float = 0.0
    texts: tuple[str, ...] = ()  # for the APIs of other protocols; none where only HTTP can send it


class Reply(NamedTuple):
    """What came back: a status and a body, or else what went wrong."""

    status: int = 0
    body: bytes = b""
    trouble: str = ""


def post(body: bytes, headers: str = "", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    return head.encode() + body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


JSON = "Content-Type: application/json\r\n"


def good(n: str, rng: random.Random, **more: Any) -> Question:
    text = f"good {n}"
    return Question("good", post(text.encode()), content=answer(text), texts=(text,), **more)


def several(n: str, rng: random.Random) -> Question:
    texts = [f"good {n} {i}" for i in range(rng.randint(2, 12))]
    body = json.dumps({"inputs": texts}).encode()
    return Question("a list", post(body, JSON), content=[answer(text) for text in texts], texts=tuple(texts))


def huge(n: str, rng: random.Random) -> Question:
    text = f"good {n} " + "and so on " * rng.randint(1_000, MAX_BODY_BYTES // 11)
    reads_after_s = rng.choice((0, 0, 0.5))
    return Question(
        "huge", post(text.encode()), content=answer(text), reads_after_s=reads_after_s, texts=(text,)
    )


def bad(n: str, rng: random.Random) -> Question:
    text = f"bad {n}"
    raw, status = rng.choice(
        [
            (post(text.encode()), 422),
            (post(b""), 400),
            (post(b"\xff\xfe"), 400),
            (post(b'{"inputs": "good', JSON), 400),
            (post(b'{"parameters": {}}', JSON), 400),
            (post(b"good", "Content-Type: image/png\r\n"), 415),
            (post(b"x" * (MAX_BODY_BYTES + 1)), 413),
            (get("/no/such/path"), 404),
            (get("/metrics"), 200),
            (get("/ready"), 200),  # of which a 503 has an error like any other
        ]
    )
    return Question("bad", raw, (status,), texts=(text,) if status == 422 else ())


def poison(n: str, rng: random.Random) -> Question:
    text = f"poison {n}"
    return Question("poison", post(text.encode()), (500,), texts=(text,))


def kills(n: str, rng: random.Random) -> Question:
    text = f"kills {rng.randrange(6)}"
    return Question("kills", post(text.encode()), (500, 422), texts=(text,))


def dawdles(n: str, rng: random.Random) -> Question:
    text = f"dawdles {n}"
    return Question("dawdles", post(text.encode()), content=answer(text), texts=(text,))


def hurried(n: str, rng: random.Random) -> Question:
    text = f"good {n}"
    raw = post(text.encode(), "Prefer: wait=1\r\n")
    return Question("hurried", raw, content=answer(text), deadline_s=1.0, texts=(text,))


def leaves(n: str, rng: random.Random) -> Question:
    text = f"{rng.choice(('good', 'dawdles', 'poison'))} {n}"
    raw, whole = post(text.encode()), rng.random() < 0.7
    raw = raw if whole else raw[: rng.randrange(len(raw))]
    return Question(LEAVES, raw, leaves_after_s=rng.uniform(0, 0.3), texts=(text,) if whole else ())


def stalls(n: str, rng: random.Random) -> Question:
    """A body that never ends: told so in time, or that the server stops."""
    return Question("stalls", post(b"good ", length=100), (408,), deadline_s=BODY_TIMEOUT_S)


KINDS: dict[Callable[[str, random.Random], Question], int] = {
    good: 54, several: 8, huge: 4, bad: 10, poison: 4, kills: 2, dawdles: 4, hurried: 5, leaves: 6, stalls: 3,
}  # fmt: skip


@dataclass(slots=True)
class Outcome:
    """One request and its end, in seconds on the monotonic clock. An hour has many: what was said is not kept."""

    kind: str
    sent_at: float
    ended_at: float
    status: int
    trouble: str  # why there was no reply
    wrong: str  # what is wrong with it in any case
    excuses: str = ""  # what it is instead, while a process dies or the model raises on everybody: nothing, or also wrong
    over_s: float = 0.0  # after its deadline
    answered: bool = False

    @property
    def name(self) -> str:
        return self.trouble or str(self.status)

    def verdict(self, may_fail: bool, may_be: Container[str], lag_s: float) -> str:
        """What is wrong with it, empty where it is a right outcome.

        `may_fail`: a process died, or the model raised on everybody, meanwhile; `may_be`: the troubles that are nobody's
        fault, as the server was restarted; `lag_s`: how long the clients themselves were held up.
        """
        if self.trouble in may_be:
            return ""
        if self.over_s > SLACK_S + lag_s and not self.trouble:
            return f"late by {self.over_s:.1f} s"
        return self.excuses if may_fail and self.status == 500 else self.wrong


def judged(asked: Question, reply: Reply, sent_at: float, ended_at: float) -> Outcome:
    """What came of it, as far as the two alone can tell."""
    content, wrong = wrong_content(asked, reply), ""
    if asked.leaves_after_s is not None:
        return Outcome(LEAVES, sent_at, ended_at, reply.status, LEFT if reply.trouble else "", "")
    if reply.trouble:
        wrong = f"{reply.trouble} {reply.body.decode()}".strip()
    elif reply.status not in (*asked.statuses, 503, 504):
        wrong = f"{reply.status}, not {' or '.join(map(str, asked.statuses))}"
    over_s = ended_at - sent_at - asked.deadline_s
    answered = reply.status == 200 and asked.content is not None
    return Outcome(
        asked.kind,
        sent_at,
        ended_at,
        reply.status,
        reply.trouble,
        wrong or content,
        content,
        over_s,
        answered,
    )


def wrong_content(asked: Question, reply: Reply) -> str:
    """What is wrong with what it says."""
    if reply.trouble or (reply.status == 200 and asked.content is None):
        return ""
    try:
        said = json.loads(reply.body)
    except ValueError:
        return "no JSON"
    if reply.status == 200:
        return "" if said == asked.content else "mixed up"
    fine = isinstance(said, dict) and said.keys() == {"error"} and isinstance(said["error"], str)
    return "" if fine else "an error of another form"


# Where the server is, what is sent -> the reply; over HTTP here, over gRPC in chaos_grpc.py.
API = Callable[[str, Question], Any]


async def over_http(url: str, question: Question) -> Reply:
    """Send it on a connection of its own; never raises. Whatever comes after the reply counts as another one."""
    where, writer = urlsplit(url), None
    patience_s = question.deadline_s + 3 * SLACK_S
    if question.leaves_after_s is not None:
        patience_s = question.leaves_after_s
    try:
        async with asyncio.timeout(patience_s):
            reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**20)
            with contextlib.suppress(ConnectionError):  # refused before all is sent: there may be a reply
                writer.write(question.raw)
                await writer.drain()
            await asyncio.sleep(question.reads_after_s)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
            body = await reader.readexactly(length)
            more = b""
            with contextlib.suppress(ConnectionError):
                more = await reader.read()
            return Reply(int(head[9:12]), body, TWICE if more else "")
    except ConnectionRefusedError:
        return Reply(trouble=NOBODY)
    except TimeoutError:
        return Reply(trouble=HUNG)
    except ConnectionResetError:
        return Reply(trouble=UNHEARD)
    except (OSError, EOFError, ValueError) as exc:
        return Reply(body=repr(exc).encode(), trouble=LOST)
    finally:
        if writer:
            writer.transport.abort()


async def asked(url: str, question: Question, api: API = over_http) -> Outcome:
    """Ask it through this API; return what came of it."""
    sent_at = time.monotonic()
    reply = await api(url, question)
    return judged(question, reply, sent_at, time.monotonic())
