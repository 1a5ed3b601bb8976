"""Chaos for generated texts: clients of every kind, the model's process killed among them, and counts that must add up.

    python -m loadtests.chaos.texts                                # models/chat, a minute
    python -m loadtests.chaos.texts --model FOLDER --seconds 600

Some read whole answers, some streams; some leave in the middle, read slowly, send long prompts or ones that never fit. Every
whole text must be the one that its prompt gets alone, every other end an error that says why. At the end nothing may run or
wait, the KV cache must be free, and the server must have counted what the clients saw.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from loadtests.modes import MODES, ROOT, Server, start
from loadtests.plan.planner import markdown

RATE_PER_S, PROMPTS, TOKENS, LONG_WORDS = 8.0, 6, 16, 150
KILL_EVERY_S = 12.0
PATIENCE_S = 60.0
MODE = "process"
ERRORS = {500, 503, 504}  # the model's process died; no room, or the next one loads; late
KINDS = {"whole": 6, "streamed": 8, "leaves": 4, "reads slowly": 2, "long prompt": 3, "never fits": 1}


@dataclass
class Texts:
    """A storm around one server: what its clients saw, and what was wrong."""

    server: Server
    rng: random.Random
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)
    whole = tokens = 0  # texts that came to their end, and the tokens of all that came

    async def run(self, seconds: float) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=PATIENCE_S, limits=limits) as self.http:
            prompts = [
                f"{self.rng.choice(('the river', 'an old dog', 'a city'))} {n} " for n in range(PROMPTS)
            ]
            prompts.append("a long way over the hills " * (LONG_WORDS // 6))
            for prompt in prompts:
                reply = await self.http.post(self.server.url, json=body(prompt))
                self.alone[prompt] = reply.json()[0]["generated_text"]
            before = await self.counts()
            await asyncio.gather(self.clients(seconds), self.kills(seconds))
            await asyncio.to_thread(self.server.wait_until_idle)
            self.add_up(before, await self.counts())

    async def clients(self, seconds: float) -> None:
        """Clients on a schedule that waits for nobody."""
        ends_at, tasks = time.monotonic() + seconds, []
        while time.monotonic() < ends_at:
            (kind,) = self.rng.choices(list(KINDS), list(KINDS.values()))
            tasks.append(asyncio.create_task(self.client(kind)))
            await asyncio.sleep(self.rng.expovariate(RATE_PER_S))
        await asyncio.gather(*tasks)

    async def client(self, kind: str) -> None:
        """One request and its end."""
        *short, long = self.alone
        prompt = long if kind == "long prompt" else self.rng.choice(short)
        try:
            if kind == "never fits":
                end = await self.read_whole("and so on " * 5000)
            elif kind in ("whole", "long prompt"):
                end = await self.read_whole(prompt)
            else:
                end = await self.read_stream(kind, prompt)
        except httpx2.TimeoutException:
            end = "hung"
        except httpx2.TransportError as exc:
            end = f"lost: {exc!r}"
        self.ends[kind, end] += 1
        right = {"never fits": ("422", "error"), "leaves": ("whole", "left", "error")}.get(
            kind, ("whole", "error")
        )
        if end not in right:
            self.defects.append(f"{kind}: {end}")

    async def read_whole(self, prompt: str) -> str:
        reply = await self.http.post(self.server.url, json=body(prompt))
        if reply.status_code == 200:
            return self.judge(prompt, reply.json()[0]["generated_text"], TOKENS)
        told = "error" in reply.json()
        return "error" if told and reply.status_code in ERRORS else str(reply.status_code)

    async def read_stream(self, kind: str, prompt: str) -> str:
        leaves_after = self.rng.randrange(TOKENS) if kind == "leaves" else TOKENS
        async with self.http.stream("POST", self.server.url, json=body(prompt) | {"stream": True}) as reply:
            if reply.status_code != 200:
                return "error" if reply.status_code in ERRORS else str(reply.status_code)
            text, n = "", 0
            async for line in reply.aiter_lines():
                event = json.loads(line[5:]) if line.startswith("data:") else {}
                if "error" in event:
                    return "error"
                if "token" in event:
                    text, n = text + event["token"]["text"], n + 1
                    if n > leaves_after:
                        self.tokens += n
                        return "left"
                    if event["details"]:
                        return self.judge(prompt, text, n)
                await asyncio.sleep(0.2 if kind == "reads slowly" else 0)
        return "ended without its end"

    def judge(self, prompt: str, text: str, tokens: int) -> str:
        self.whole, self.tokens = self.whole + 1, self.tokens + tokens
        return "whole" if text == self.alone[prompt] else "another text than alone"

    async def kills(self, seconds: float) -> None:
        """Now and then the model's process ends."""
        for _ in range(int(seconds // KILL_EVERY_S)):
            await asyncio.sleep(KILL_EVERY_S)
            for process in self.server.processes():
                if "workers.isolation.process" in " ".join(process.cmdline()):
                    process.kill()

    async def counts(self) -> Counter[str]:
        """The server's metrics."""
        text = (await self.http.get(self.server.url + "metrics")).text
        return Counter({name: int(float(n)) for name, n in re.findall(r"^(model_\S+) (\S+)$", text, re.M)})

    def add_up(self, before: Counter[str], after: Counter[str]) -> None:
        """Note what the server counted otherwise than the clients."""
        for gauge in ("model_running", "model_queue_depth", "model_kv_cache_tokens"):
            if after[gauge]:
                self.defects.append(f"{gauge} is {after[gauge]} when all is over")

        def since(name: str, *labels: str) -> int:
            return sum(after[f"{name}{{{one}}}"] - before[f"{name}{{{one}}}"] for one in labels)

        left = sum(n for (_, end), n in self.ends.items() if end == "left")
        ended = since("model_sequences_total", 'reason="stop"', 'reason="length"')
        cancelled = since("model_sequences_total", 'reason="cancelled"')
        # The last tokens of one that left may be there before its client's end is noticed.
        if not self.whole <= ended <= self.whole + left or cancelled > left:
            self.defects.append(
                f"{ended} ended and {cancelled} were cancelled: {self.whole} were whole, {left} left"
            )
        if (generated := since("model_tokens_total", 'kind="generated"')) < self.tokens:
            self.defects.append(f"{generated} tokens were generated, {self.tokens} came")

    def report(self) -> str:
        rows = [{"client": kind, "end": end, "how often": n} for (kind, end), n in sorted(self.ends.items())]
        defects = "\n".join(f"- {defect}" for defect in self.defects) or "Defects: none."
        return f"{markdown(rows)}\n\n{self.whole} whole texts, {self.tokens} tokens. {defects}"


def body(prompt: str) -> dict[str, Any]:
    """A request whose answer is the same every time."""
    parameters = {"max_new_tokens": TOKENS, "do_sample": False, "ignore_eos": True, "return_full_text": False}
    return {"inputs": prompt, "parameters": parameters}


def storm(model: str, seconds: float, seed: int) -> Texts:
    """Start a server with a model process, let it be stormed, stop it."""
    settings = {"TASK": "text-generation", "MODEL": model, "CONTEXT_TOKENS": "512", "KV_CACHE_MB": "200"}
    env = {**settings, "MAX_SEQUENCES": "8", "BODY_TIMEOUT_S": "5", "DEADLINE_S": "20"}
    with start(MODES[MODE], env) as server:
        texts = Texts(server, random.Random(seed))
        asyncio.run(texts.run(seconds))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "models" / "chat"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = storm(str(Path(options.model).resolve()), options.seconds, options.seed)
    print(texts.report())
    sys.exit(bool(texts.defects))


if __name__ == "__main__":
    main()
