"""What runs in the next step: pure Python, no clock of its own, no model.

    scheduler.add(sequence)
    step = scheduler.plan(now)          the rows of the next step; None when there is nothing to do
    scheduler.advance(step, outcomes)   what the model made of them

The rule. Each running sequence gets its next token (decode). What is left of the step's token budget goes to prompts, in
chunks (prefill): first those that are being read, then waiting ones, in the order of their arrival, as long as a slot is
free. So a long prompt never holds up those who are reading an answer, and a short prompt waits for the prompts that came
before it, never for later ones.

The budget follows the measured time of a step (`StepCost`): beside running sequences a step takes as many tokens of prompts
as keep it within GAP_STEPS times the time of a step without any. That is the longest gap that a reader sees. Prompts are
read all the same where even LEAST_PROMPT tokens take longer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from workers.generation.grammar import Matcher
from workers.generation.slots import Slots
from workers.generation.step_cost import StepCost, Work
from workers.generation.steps import Choice, Options, Outcome, Row, Token

GAP_STEPS = 2.5  # the promise is 3 steps: a step takes now and then longer than predicted
LEAST_PROMPT = 8  # tokens of prompts in a step, however slow they are: prompts must not starve
CHUNK_SHARES = 4  # a token of a chunk reads the cache at a quarter of the cost: the others read the same keys
NO_WAY_ON = "the text can't follow its schema, which is too complex or allows no end; send a simpler one"
# Where nobody waits for a next token. Longer chunks are slower: attention's scores leave the cache.
MOST_PROMPT = 256


@dataclass(eq=False)
class Sequence:
    """A prompt and what is generated after it. It ends exactly once: `reason` says why, empty while it goes on.

    stop: an end-of-sequence token or a stop string · length: `max_tokens` · cancelled: nobody reads it any more ·
    late: its deadline passed before its first token · failed: the model failed on it · stopping: the server stopped
    """

    prompt: list[int]
    options: Options
    arrived_at: float = 0.0
    deadline: float = float("inf")  # of its first token
    owner: str = ""  # whose it is: only a sequence of the same owner may start in what it leaves in its slot
    tokens: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in its slot
    reused: int = 0  # those of them that were there when it started
    slot: int = -1  # -1 before it has started and after it has ended
    started_at: float = 0.0
    reason: str = ""
    paused: bool = False  # its reader is slow
    grammar: Matcher | None = None  # what its text must be

    @property
    def total(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def row(self, most: int) -> Row:
        """Its next `most` tokens at most that are not in its slot yet; with the last of them comes a new one."""
        start, end = self.cached, min(self.total, self.cached + most)
        ids = self.prompt[start:end] if start < len(self.prompt) else self.tokens[start - len(self.prompt) :]
        if end < self.total:
            return Row(self.slot, start, ids)
        prompt, tokens = (self.prompt, self.tokens[:]) if self.options.has_penalties else (None, None)
        return Row(self.slot, start, ids, Choice(self.options, len(self.tokens), prompt, tokens))

    def accept(self, token: Token) -> str:
        """Take its next token; return why it ends with that, empty where it goes on; "failed" where its grammar does."""
        self.tokens.append(token.id)
        if self.grammar and not self.grammar.accept(token.id):
            return "failed"
        if token.id in self.options.end_ids and len(self.tokens) > self.options.min_tokens:
            return "stop"
        return "length" if len(self.tokens) >= self.options.max_tokens else ""


@dataclass(eq=False)
class Step:
    """The rows of a step and whose they are."""

    sequences: list[Sequence]
    rows: list[Row]
    work: Work
    started: list[Sequence]  # those of them that had no slot before

    @property
    def has_grammars(self) -> bool:
        return any(row.choice and s.grammar for s, row in zip(self.sequences, self.rows))

    def mask(self) -> None:
        """Write into each row which tokens its grammar lets come next. Call it in a thread: a mask may take 8 ms."""
        for i, (sequence, row) in enumerate(zip(self.sequences, self.rows)):
            if row.choice and sequence.grammar:
                mask = sequence.grammar.mask()
                self.rows[i] = row._replace(choice=row.choice._replace(mask=mask))


class Scheduler:
    """Sequences that wait and sequences that run. `step_tokens`: 0 follows the measured time of a step."""

    def __init__(self, slots: int, cost: StepCost, step_tokens: int = 0, prefill_first: bool = False) -> None:
        self.slots, self.cost = Slots(slots), cost
        self.step_tokens, self.prefill_first = step_tokens, prefill_first
        self.waiting: dict[Sequence, None] = {}  # in the order of their arrival
        self.running: dict[Sequence, None] = {}  # in the order of their start
        self.reused = 0  # tokens of prompts that were in a slot already

    def add(self, sequence: Sequence) -> None:
        self.waiting[sequence] = None

    def end(self, sequence: Sequence, reason: str) -> bool:
        """End it for this reason, unless it has ended; free its slot. Return whether it had not ended."""
        if sequence.reason:
            return False
        sequence.reason = reason
        self.waiting.pop(sequence, None)
        if sequence in self.running:
            del self.running[sequence]
            ids = (sequence.prompt + sequence.tokens)[: sequence.cached]
            self.slots.give_back(sequence.slot, sequence.owner, [] if reason == "failed" else ids)
            sequence.slot = -1
        return True

    def plan(self, now: float = 0.0) -> Step | None:
        """Return the next step; sequences that have their first part in it leave the queue. None: nothing can run."""
        decoding = [s for s in self.running if s.tokens and not s.paused]
        reading = [s for s in self.running if not s.tokens]
        started: list[Sequence] = []
        if self.prefill_first and (reading or (self.waiting and len(self.slots))):
            decoding = []  # what others do: all who are reading an answer wait for every prompt
        start = max((s.cached for s in reading), default=0)
        budget = self.prompt_budget(len(decoding), sum(s.cached for s in decoding), start)
        sequences, rows = decoding, [s.row(1) for s in decoding]
        for sequence in [*reading, *self.waiting]:
            if budget <= 0 or not (sequence in self.running or len(self.slots)):
                break
            if sequence not in self.running:
                self._start(sequence, now)
                started.append(sequence)
            rows.append(sequence.row(budget))
            sequences.append(sequence)
            budget -= len(rows[-1].ids)
        return Step(sequences, rows, work(rows), started) if rows else None

    def _start(self, sequence: Sequence, now: float) -> None:
        """Give a waiting sequence its slot."""
        del self.waiting[sequence]
        self.running[sequence] = None
        sequence.slot, sequence.cached = self.slots.take(sequence.prompt, sequence.owner)
        sequence.started_at = now
        sequence.reused = sequence.cached
        self.reused += sequence.cached

    def prompt_budget(self, decoding: float, cached: float, start: float = 0) -> int:
        """Return how many tokens of prompts a step takes beside so many sequences that have so much in the cache.

        `start`: how far a prompt has been read, which its next tokens look back to.
        """
        if self.step_tokens:
            return max(LEAST_PROMPT, int(self.step_tokens - decoding))
        if not decoding:
            return MOST_PROMPT
        plain_s = self.cost.predict_s(Work(0, decoding, cached))
        per_token_s = self.cost.predict_s(Work(1, decoding, cached + start / CHUNK_SHARES)) - plain_s
        most = (GAP_STEPS - 1) * plain_s / per_token_s if per_token_s else MOST_PROMPT
        return max(LEAST_PROMPT, tidy(decoding + min(most, MOST_PROMPT)) - int(decoding))

    def advance(self, step: Step, outcomes: list[Outcome]) -> Iterable[tuple[Sequence, Token | str, str]]:
        """Take what the model made of each row; yield each sequence that got a token or failed, and why it ends, if it does.

        It does not end them: the caller may know another reason. Rows of sequences that have ended meanwhile are skipped.
        """
        for sequence, row, outcome in zip(step.sequences, step.rows, outcomes, strict=True):
            if sequence.reason:
                if isinstance(outcome, str):  # the model has cleared the slot that it left
                    self.slots.drop(row.slot)
                continue
            if isinstance(outcome, str):
                yield sequence, outcome, "failed"
                continue
            sequence.cached += len(row.ids)
            if outcome is not None:
                reason = sequence.accept(outcome)
                yield sequence, NO_WAY_ON if reason == "failed" else outcome, reason


def work(rows: Iterable[Row]) -> Work:
    """Return what there is to do in these rows, in the terms of the cost law."""
    prompt = sequences = cached = 0
    for row in rows:
        if row.choice and row.choice.generated:
            sequences += 1
            cached += row.start
        else:
            prompt += len(row.ids)
            cached += row.start * len(row.ids) // CHUNK_SHARES
    return Work(prompt, sequences, cached)


def tidy(rows: float) -> int:
    """Round down to a number of rows that a CPU's matrix product does without padding."""
    unit = 4 if rows < 64 else 32
    return int(rows // unit * unit)
