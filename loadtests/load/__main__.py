"""Locust's page against a running server, or against one that is started for it: `make load`.

    $ make load                                          # http://127.0.0.1:8089; the server is on port 8000
    $ make load LOAD="--host https://example.com"        # another server
    $ make load LOAD="--headless -t 30s OpenLoop --rate-per-s 50"

Everything behind LOAD= goes to Locust: `locust --help` lists it, docs/loadtests.md explains it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from loadtests.modes import ROOT, Mode, free_port, start

DEFAULT = "http://127.0.0.1:8000"
PAGE_PORT = 8089


@contextlib.contextmanager
def server() -> Iterator[str]:
    """Yield where a server answers: on the usual port, or one with the settings of the environment, until the end."""
    if answers(DEFAULT):
        print(f"Asking the server that runs on {DEFAULT}.", flush=True)
        yield DEFAULT
        return
    port = free_port() if is_taken(8000) else 8000
    print(
        f"No server runs on {DEFAULT}: starting one on port {port}, with its settings from the environment.",
        flush=True,
    )
    with start(Mode("load", "uvicorn server:app --no-access-log"), port=port, base={}) as started:
        yield started.url.rstrip("/")


def answers(url: str) -> bool:
    """Return whether a server of this kind answers there, with whatever status."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except urllib.error.HTTPError as exc:
        exc.close()
        return True
    except OSError:
        return False


def is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def locust(*arguments: str) -> int:
    """Run Locust in this terminal; it ends by itself on Ctrl-C, and so does this."""
    with subprocess.Popen([str(Path(sys.executable).parent / "locust"), *arguments], cwd=ROOT) as process:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:  # which it has got, too: it says what there is so far
                continue


def main(arguments: list[str]) -> int:
    """Run Locust with these arguments; return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as Ctrl-C does: leave no server behind
    own_page = not {"--headless", "-P", "--web-port", "--worker", "-h", "--help"} & set(arguments)
    if own_page and is_taken(PAGE_PORT):
        print(
            f'Port {PAGE_PORT} is taken; use another for the page: make load LOAD="-P 8090"', file=sys.stderr
        )
        return 2
    if {"-H", "--host", "-h", "--help", "-l", "--list", "--worker"} & set(arguments) or os.environ.get(
        "LOCUST_HOST"
    ):
        return locust(*arguments)
    try:
        with server() as url:
            return locust("--host", url, *arguments)
    except KeyboardInterrupt:
        print("Interrupted while the server started.", file=sys.stderr)
    except RuntimeError as exc:  # the server's own log
        print(exc, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
