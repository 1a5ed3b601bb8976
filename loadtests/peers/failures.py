"""What happens when something goes wrong, in words: a stub model that can fail, few clients, no speed measured."""

import json
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from loadtests.modes import Server, is_alive
from loadtests.peers.catalogue import Peer
from loadtests.peers.visit import Reply, ask, running

NEIGHBOURS, LEAVERS, ASKERS = 7, 20, 16
PATIENCE_S, BACK_S = 8.0, 8.0
Found = dict[str, str]


def told(outcomes: list[str]) -> str:
    """7 x 200, 1 x 500."""
    return ", ".join(f"{n} x {outcome}" for outcome, n in Counter(outcomes).most_common()) or "none"


def ended(server: Server, family: list[psutil.Process]) -> str:
    """Wait until all of its processes are gone: the first may leave the others behind, and these may go on answering."""
    began, first_s = time.monotonic(), None
    while (waited_s := time.monotonic() - began) < BACK_S:
        if first_s is None and server.process.poll() is not None:
            first_s = waited_s
        if first_s is not None and not any(map(is_alive, family)):
            return f"exits after {waited_s:.1f} s"
        time.sleep(0.02)
    if first_s is None:
        return f"still running after {BACK_S:g} s"
    return f"the first process exits after {first_s:.1f} s, its others keep running"


class Failures:
    """The rows of one peer. Each takes a running server."""

    def __init__(self, peer: Peer, cpus: set[int]) -> None:
        self.peer, self.cpus = peer, cpus

    def find(self) -> Found:
        """All of them; one that can't be seen says why, the others are still found."""
        with tempfile.TemporaryDirectory() as folder:
            self.calls = Path(folder) / "calls"
            found: Found = {}
            parts: list[tuple[tuple[str, ...], Callable[[Server], Found]]] = [
                (("a client that leaves", "one bad text"), self.leave_then_bad),
                (("SIGTERM under load",), self.stop),
                (("model killed",), lambda server: self.break_with("model killed", "KILL", server)),
                (("model hangs",), lambda server: self.break_with("model hangs", "HANG", server)),
            ]
            for names, part in parts:
                try:
                    with running(self.peer, "tricks", self.cpus, self.calls) as server:
                        found |= part(server)
                except (RuntimeError, OSError) as exc:
                    found |= {name: f"not seen: {exc}" for name in names}
            return found

    def leave_then_bad(self, server: Server) -> Found:
        return {"a client that leaves": self.leave(server), "one bad text": self.bad(server)}

    def ask_all(self, server: Server, texts: list[str], timeout_s: float) -> list[Reply]:
        """All at the same time, while the model is busy with another: they can share a batch."""
        with ThreadPoolExecutor(len(texts) + 1) as pool:
            pool.submit(ask, server.url, self.peer.asked, "the first", PATIENCE_S)
            time.sleep(0.05)
            return list(pool.map(lambda text: ask(server.url, self.peer.asked, text, timeout_s), texts))

    def leave(self, server: Server) -> str:
        """Clients hang up before the model is free; then wait until it has nothing more to do."""
        self.ask_all(server, [f"leaver {i}" for i in range(LEAVERS)], 0.1)
        ask(server.url, self.peer.asked, "the last", PATIENCE_S)  # behind them, where there is a queue
        time.sleep(1.0)
        texts = [text for line in self.calls.read_text().splitlines() for text in json.loads(line)]
        return f"{sum('leaver' in text for text in texts)} of {LEAVERS} computed"

    def bad(self, server: Server) -> str:
        texts = ["BAD", *(f"neighbour {i}" for i in range(NEIGHBOURS))]
        bad, *others = self.ask_all(server, texts, PATIENCE_S)
        later = ask(server.url, self.peer.asked, "later", PATIENCE_S)
        return f"bad input {bad.outcome}; rest of batch {told([r.outcome for r in others])}; afterwards {later.outcome}"

    def stop(self, server: Server) -> Found:
        """Clients ask again and again; what those get who had asked before the signal, and who asked after it."""
        before: list[str] = []
        after: list[str] = []
        ends, signalled = time.monotonic() + 2.5, threading.Event()

        def client() -> None:
            while time.monotonic() < ends:
                is_after = signalled.is_set()
                reply = ask(server.url, self.peer.asked, "a text", PATIENCE_S)
                if is_after:
                    after.append(reply.outcome)
                    time.sleep(0.1)
                elif signalled.is_set():
                    before.append(reply.outcome)

        with ThreadPoolExecutor(ASKERS) as pool:
            for _ in range(ASKERS):
                pool.submit(client)
            time.sleep(1.0)
            family = server.processes()
            signalled.set()
            server.process.send_signal(signal.SIGTERM)
            end = ended(server, family)
        later = " or ".join(sorted(set(after))) or "nobody asked"
        return {"SIGTERM under load": f"in flight {told(before)}; afterwards {later}; {end}"}

    def break_with(self, name: str, trick: str, server: Server) -> Found:
        """One text breaks the model; what those get who wait with it, and when a later one is answered."""
        texts = [trick, *(f"neighbour {i}" for i in range(NEIGHBOURS))]
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.ask_all, server, texts, BACK_S)
            time.sleep(0.5)
            back_s = None
            while back_s is None and time.monotonic() - began < BACK_S:
                if ask(server.url, self.peer.asked, "later", 1.0).outcome == "200":
                    back_s = time.monotonic() - began
                time.sleep(0.1)
            outcomes = [reply.outcome for reply in waiting.result()]
        later = f"recovers after {back_s:.0f} s" if back_s else f"no recovery within {BACK_S:g} s"
        dead = "" if server.process.poll() is None else ", server exited"
        return {name: f"in flight {told(outcomes)}; {later}{dead}"}
