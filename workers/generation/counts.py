"""What is counted of generation, beside what every model loop counts (`model_batch_size` is sequences in a step there)."""

from prometheus_client import Counter, Histogram

from workers.metrics import SECONDS, Metrics


class Counts:
    """Tokens and their times, in the registry of the loop's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self.tokens = Counter(
            "model_tokens",
            "Tokens by kind: prompt (computed), reused (of prompts that were in a slot), generated, wasted",
            ["kind"],
            registry=registry,
        )
        self.prompt, self.reused, self.generated, self.wasted = map(
            self.tokens.labels, ("prompt", "reused", "generated", "wasted")
        )
        self.sequences = Counter(
            "model_sequences", "Sequences by why they ended", ["reason"], registry=registry
        )
        for reason in ("stop", "length", "cancelled", "late", "failed", "stopping"):
            self.sequences.labels(reason)  # from zero on: PromQL takes no rate of what is not there yet
        self.first_token = Histogram(
            "model_time_to_first_token_seconds",
            "Time from admission to the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.between_tokens = Histogram(
            "model_inter_token_latency_seconds",
            "Time from a token of a sequence to its next one",
            buckets=SECONDS,
            registry=registry,
        )
        self.whole = Histogram(
            "model_generation_seconds",
            "Time from admission to the last token, of sequences that came to their end",
            buckets=SECONDS,
            registry=registry,
        )
        self.step = Counter(
            "model_step_seconds",
            "Time of steps by part: plan, model (the way there and back included), hand_out",
            ["part"],
            registry=registry,
        )
        self.planning, self.model, self.handing_out = map(self.step.labels, ("plan", "model", "hand_out"))
