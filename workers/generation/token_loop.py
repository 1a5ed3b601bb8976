"""The token loop: one queue, one model, and every sequence ended exactly once, with a reason.

    submit(prompt) -> waiting -> [ plan -> run(step) -> hand out tokens ] -> each sequence's own stream

It is `workers/loop.py` one level down, with the same life: admission, deadlines, failures, stopping. All of this file runs on
one event loop, so there are no locks; only `run`, the model, is elsewhere (a thread, a process). Between two steps arrivals
and departures take effect. The next step is on its way before those who read the last one's tokens are woken up, so that
HTTP's work is done while the model computes.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

from workers.errors import LOADING, STOPPING, TOO_SHORT, Late, ModelDied, ModelFailed, Rejected, Unanswered
from workers.generation.admission import Admission
from workers.generation.counts import Counts
from workers.generation.grammar import SchemaFailed
from workers.generation.scheduler import NO_WAY_ON, Scheduler, Sequence, Step, work
from workers.generation.slots import OWNER, Slots
from workers.generation.step_cost import StepCost, Work
from workers.generation.steps import Limits, Options, Outcome
from workers.generation.stream import MOST_UNREAD, Piece, Stream, whole_of_each
from workers.generation.text import Asked, TextStream
from workers.generation.warm_up import warm_up_steps
from workers.jobs import Answer
from workers.metrics import Metrics
from workers.offload import in_thread
from workers.scheduling.cost_model import Run
from workers.scheduling.instances import Instances, Ready
from workers.scheduling.warm_up import shortest_s

log = logging.getLogger("uvicorn.error")


@dataclass(eq=False)
class TokenLoop:
    """Feeds `run` with steps. `most_waiting`: tokens of prompts in the queue; `budget_s`: until the first token.

    `cost_model` is learnt at `warm_up`; a loop that is given a law and `set_limits` needs none.
    """

    most_waiting: int = 100_000
    step_tokens: int = 0
    prefill_first: bool = False
    budget_s: float = 10.0
    hang_s: float = math.inf
    metrics: Metrics = field(default_factory=Metrics)
    cost_model: StepCost = field(default_factory=StepCost)
    now: Callable[[], float] = lambda: asyncio.get_running_loop().time()
    # Called after each step, with its duration in seconds.
    observer: Callable[[Step, float], None] | None = None
    # What a whole answer is made of, for `submit_all`: of a query what is asked, of its pieces the answer.
    opened: Callable[[Any], Asked] = Asked
    answered: Callable[[Any, Piece], Any] = lambda query, piece: [token.id for token in piece.tokens]

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(0, self.cost_model, self.step_tokens, self.prefill_first)
        self.instances = Instances(self.cost_model.predict_s, self.hang_s, self.now, self._reject_hopeless)
        self.admission = Admission(self.scheduler, self.instances, self.most_waiting, self.budget_s)
        self.counts = Counts(self.metrics)
        self.metrics.watch(
            "model_kv_cache_tokens", "Tokens in the KV cache of sequences that run", self.cached
        )
        self.metrics.watch(
            "model_kv_cache_capacity_tokens", "Tokens that the KV cache has room for", self.room
        )
        self.streams: dict[Sequence, Stream] = {}  # admitted and not yet ended
        self.limits = Limits(0, 0)
        self.wake = asyncio.Event()  # something may have come that can run
        self._drained = asyncio.Event()
        self._ready: Ready | None = None
        self._model: Any = None  # what `ready` returned: of another model it returns something else

    # --- what a handler calls -----------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        options: Options = Options(),  # noqa: B008  immutable
        text: TextStream | None = None,
        *,
        budget_s: float = math.inf,
    ) -> Stream:
        """Return the stream of what is generated after `prompt`, its first token within `budget_s` (never more than the
        loop's own). Raises Rejected where that can't be had."""
        (stream,) = self.submit_each([Asked(prompt, options, text)], budget_s=budget_s)
        return stream

    def submit_each(self, asked: Several[Asked], *, budget_s: float = math.inf) -> list[Stream]:
        """Return a stream for each of several prompts, all of them admitted or none. Raises Rejected."""
        budget_s = min(budget_s, self.budget_s)
        firsts_s = self.admission.admit_each(asked, budget_s)
        return [self._admit(*each, budget_s) for each in zip(asked, firsts_s)]

    def _admit(self, asked: Asked, first_s: float, budget_s: float) -> Stream:
        """Let a sequence wait, whose first token is expected in `first_s`."""
        now = self.now()
        sequence = Sequence(asked.prompt, asked.options, now, now + budget_s, OWNER.get())
        sequence.grammar = asked.grammar
        stream = self.streams[sequence] = Stream(self, sequence, asked.text)
        stream.promised_at = now + first_s * self.cost_model.margin
        if self.admission.is_hopeless(first_s, budget_s):
            self.admission.trial = sequence
        late = Late(f"no token within {budget_s:.3g} s; allow more time")
        stream.timer = asyncio.get_running_loop().call_later(budget_s, self.end, stream, "late", late)
        self.scheduler.add(sequence)
        self.wake.set()
        return stream

    async def submit_all(
        self, queries: Several[Any], sizes: Several[float], *, budget_s: float = math.inf
    ) -> list[Answer]:
        """Return the whole answers to all `queries`, in order, or raise the first failure; its `index` says whose it is.

        All are admitted or none; when one fails or the client leaves, the others end.
        """
        streams = self.submit_each([self.opened(query) for query in queries], budget_s=budget_s)
        pieces = await whole_of_each(streams)
        return [
            stream.answer(self.answered(query, piece))
            for query, stream, piece in zip(queries, streams, pieces, strict=True)
        ]

    def rejection(self, budget_s: float = math.inf) -> Rejected | None:
        """Why one more prompt of the usual length would be rejected now; None where it would not.

        Costs a few microseconds: ask before anything of a request is read.
        """
        first_s = self.admission.expect(int(self.admission.usual_prompt), min(budget_s, self.budget_s))
        return first_s if isinstance(first_s, Rejected) else None

    @property
    def oldest_at(self) -> float | None:
        """When the sequence that has waited longest came; None where none waits."""
        first = next(iter(self.scheduler.waiting), None)
        return first.arrived_at if first else None

    @property
    def depth(self) -> int:
        """How many sequences wait for a slot."""
        return len(self.scheduler.waiting)

    @property
    def running(self) -> int:
        """How many sequences have one."""
        return len(self.scheduler.running)

    def cached(self) -> int:
        """How many tokens the slots of running sequences hold."""
        return sum(sequence.cached for sequence in self.scheduler.running)

    def room(self) -> int:
        """How many tokens all slots have room for."""
        return self.limits.slots * self.limits.capacity

    # --- the loop -----------------------------------------------------------------------------------------------------

    async def consume(self, run: Run, ready: Ready | None = None) -> None:
        """Run steps whenever there is work and the model is `ready`, until cancelled.

        Where `ready` returns something else than before, another model has taken the place of the one that was lost.
        """
        self._ready = ready
        self.instances.loaded += 1
        try:
            while True:
                await self._until_ready()
                self._end_hopeless()
                began = self.now()
                if step := self.scheduler.plan(began):
                    self.counts.planning.inc(self.now() - began)
                    await self._run(run, step)
                else:
                    self.wake.clear()
                    await self.wake.wait()
                await asyncio.sleep(0)  # a model that blocks the event loop must not shut it out forever
        finally:
            self.instances.loaded -= 1

    async def _until_ready(self) -> None:
        """Wait until the model is ready. A new one has nothing in its slots."""
        model = await self.instances.until(self._ready)
        if self._model not in (None, model):
            self._lose(ModelDied("the model process was replaced"))
        self._model = model

    async def warm_up(self, run: Run) -> None:
        """Ask the loaded model for its limits, and time steps of several kinds: the law of a step's cost."""
        (limits,) = await run([None])
        self.set_limits(limits)
        steps = warm_up_steps(limits)
        times_s = await shortest_s(run, [[rows] for rows in steps], self.now)
        self.cost_model.warm_up(list(zip(map(work, steps), times_s, strict=True)))

    def set_limits(self, limits: Limits) -> None:
        """Take over what the model has room for: all slots are empty."""
        self.limits, self.scheduler.slots = limits, Slots(limits.slots)

    async def _run(self, run: Run, step: Step) -> None:
        """Run a step and hand out its tokens, whatever the model throws."""
        for sequence in step.started:
            self.admission.waiting_tokens -= len(sequence.prompt)
            self.counts.reused.inc(sequence.cached)
        self.admission.changed()
        call = self.instances.start(step.work)
        error: BaseException | None = None
        try:
            if step.has_grammars:
                await in_thread(step.mask)
            (outcomes,) = await run([step.rows])
            if len(outcomes) != len(step.rows):
                raise ModelFailed(f"the model gave {len(outcomes)} outcomes for {len(step.rows)} rows")
        except asyncio.CancelledError:
            raise  # the server has stopped: every sequence has ended
        except BaseException as exc:  # also SystemExit and MemoryError: no sequence may end the loop
            error = exc
        finally:
            self.instances.end(call)
        self.admission.changed()
        step_s = self.now() - call.started_at
        waits_s = [call.started_at - sequence.arrived_at for sequence in step.started]
        self.metrics.batch(len(step.rows), "step" if len(step.sequences) > 1 else "alone", step_s, waits_s)
        self.counts.model.inc(step_s)
        if error is None:
            self.cost_model.observe(step.work, step_s)
            self._hand_out(step, outcomes)
            self.counts.handing_out.inc(self.now() - call.started_at - step_s)
            if self.observer:
                self.observer(step, step_s)
        elif isinstance(error, ModelDied):
            self._lose(error)
        elif len(step.rows) > 1:
            await self._run_singly(run, step)
        else:
            self._fail(step.sequences[0], error)
        self.admission.note_trial(step)

    async def _run_singly(self, run: Run, step: Step) -> None:
        """One of the rows made it raise: run each alone, once, so that only the culprit pays."""
        log.warning("a step of %d sequences failed; running them one by one", len(step.rows))
        for sequence, row in zip(step.sequences, step.rows, strict=True):
            await self._until_ready()
            if not sequence.reason:
                await self._run(run, Step([sequence], [row], work([row]), []))

    def _hand_out(self, step: Step, outcomes: list[Outcome]) -> None:
        """Give each sequence of the step its token; end those that are done. What nobody waits for any more is wasted."""
        now = self.now()
        for sequence, row in zip(step.sequences, step.rows):
            if sequence.reason:
                self.counts.wasted.inc(len(row.ids))
            elif not sequence.tokens:
                self.counts.prompt.inc(len(row.ids))
        for sequence, outcome, reason in self.scheduler.advance(step, outcomes):
            if isinstance(outcome, str):
                self._fail(sequence, (SchemaFailed if outcome is NO_WAY_ON else ModelFailed)(outcome))
                continue
            stream = self.streams[sequence]
            self._time(stream, now)
            text = ""
            if stream.text:
                try:
                    text = "" if reason == "stop" else stream.text.push(outcome.id)
                except BaseException as exc:  # also a panic of the tokenizer's: no sequence may end the loop
                    self._fail(sequence, exc)
                    continue
                reason = "stop" if stream.text.stopped else reason
            stream.unread.append((text, outcome))
            sequence.paused = len(stream.unread) >= MOST_UNREAD
            if reason:
                self.end(stream, reason)
            stream.news.set()

    def _time(self, stream: Stream, now: float) -> None:
        """Count a token, and how long it took to come."""
        self.counts.generated.inc()
        if stream.last_at:
            self.counts.between_tokens.observe(now - stream.last_at)
        else:
            stream.first_at = now
            self.admission.note_first_token(now > stream.promised_at + self.admission.slack_s)
            self.counts.first_token.observe(now - stream.sequence.arrived_at)
            if stream.timer:
                stream.timer.cancel()
        stream.last_at = now

    # --- how sequences end --------------------------------------------------------------------------------------------

    def end(self, stream: Stream, reason: str, error: Unanswered | None = None) -> None:
        """End a sequence, unless it has ended: its slot is free, its reader gets what is left, then the `error`."""
        sequence = stream.sequence
        waited = sequence in self.scheduler.waiting
        if not self.scheduler.end(sequence, reason):
            return
        del self.streams[sequence]
        self.admission.waiting_tokens -= waited * len(sequence.prompt)
        self.admission.changed()
        self.counts.sequences.labels(reason).inc()
        if reason == "cancelled":
            self.metrics.abandoned()
        elif reason == "late" and sequence is not self.admission.trial:
            self.admission.note_first_token(True)
        elif stream.text and reason in ("stop", "length"):
            stream.rest = stream.text.rest()
        if reason in ("stop", "length"):
            self.counts.whole.observe(self.now() - sequence.arrived_at)
            self.admission.note_whole(sequence)
        if stream.timer:
            stream.timer.cancel()
        stream.error = error
        stream.news.set()
        self.wake.set()
        if not self.streams:
            self._drained.set()

    def _fail(self, sequence: Sequence, error: BaseException) -> None:
        if stream := self.streams.get(sequence):
            failed = (type(error) if isinstance(error, ModelFailed) else ModelFailed)(str(error))
            failed.__cause__ = error
            self.end(stream, "failed", failed)

    def _lose(self, error: ModelDied) -> None:
        """The model is gone, and with it all that was in the slots. Those who wait will be answered by the next one."""
        for sequence in list(self.scheduler.running):
            self._fail(sequence, error)
        self.scheduler.slots.forget()

    def _end_hopeless(self) -> None:
        """End those who wait and can't have their first token in time: to read their prompts would make others late.

        But if there are no others the first of them runs: a step corrects the estimate.
        """
        now, scheduler = self.now(), self.scheduler
        hopeless = [
            sequence
            for sequence in scheduler.waiting
            if sequence.deadline < now + self.cost_model.predict_s(Work(min(len(sequence.prompt), 64)))
        ]
        are_all = not scheduler.running and len(hopeless) == len(scheduler.waiting)
        for sequence in hopeless[are_all:]:
            self.end(self.streams[sequence], "late", Late(TOO_SHORT))

    # --- stopping -----------------------------------------------------------------------------------------------------

    def stop_admitting(self) -> None:
        """Reject new sequences from now on, and those that have not started."""
        self.instances.closing = True
        for sequence in list(self.scheduler.waiting):
            self.end(self.streams[sequence], "stopping", Rejected(STOPPING))

    async def drain(self, grace_s: float) -> None:
        """Let running sequences finish within `grace_s`, then end them: nobody is left without a last word."""
        self.stop_admitting()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.streams:
                    self._drained.clear()
                    await self._drained.wait()
        self.reject_all("the server stopped before the text was complete; try another one")

    def reject_all(self, reason: str) -> None:
        """End every sequence."""
        for stream in list(self.streams.values()):
            self.end(stream, "stopping", Rejected(reason))

    def _reject_hopeless(self) -> None:
        """While no model is loaded, reject those who can't wait until it is again."""
        if self.instances.loaded:
            return
        load_s = self.instances.load_s
        for sequence in list(self.scheduler.waiting):
            if sequence.deadline < self.now() + load_s:
                self.end(self.streams[sequence], "stopping", Rejected(LOADING, load_s))
