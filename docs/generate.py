"""`make docs`: fills the tables of these pages, and the drawing in CONTRIBUTING.md, from the code. A test fails where one is stale.

A table stands between `<!-- made by make docs: NAME -->` and `<!-- end -->`; NAME is one of TABLES.
"""

import asyncio
import inspect
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, cast

from loadtests.bench import cores
from tests.support import mode_matrix
from tests.support.embedding_models import MINILM
from tests.support.small_models import ARCHITECTURES, batching, has
from workers import tasks
from workers.metrics import Metrics
from workers.protocols import embed, openai, rerank, responses, transcriptions
from workers.protocols.chat import fields as chat
from workers.service import Service
from workers.settings import HERE as ROOT
from workers.settings import Settings
from workers.tasks.common.parameters import REFUSED, TAKES, rules_of
from workers.tasks.common.text import Rule

DOCS = Path(__file__).parent
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "CONTRIBUTING.md"]
OTHER_FILES = {"calls", "common", "custom", "pipeline", "threads"}  # in workers/tasks/, that are not a task's
TABLE = re.compile(r"(<!-- made by make docs: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
KNOB = re.compile(r"    (?:# (?P<comment>.+)|(?P<name>[A-Z_]+): .+|)")


def page(text: str) -> str:
    """The page with its tables as the code has them now."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def settings() -> str:
    """A table for each group of knobs. The comments above them say what they do."""
    knobs = {knob.name: knob for knob in fields(Settings)}
    groups: dict[str, list[list[str]]] = {}
    said: list[str] = []
    for line in inspect.getsource(Settings).splitlines():
        found = KNOB.fullmatch(line)
        if found and found["comment"]:
            said.append(found["comment"])
        elif found and found["name"]:
            if not said:
                raise SystemExit(f"{found['name']} has no comment above it that says what it does")
            knob = knobs.pop(found["name"])
            row = [
                f"`{knob.name}`",
                default(knob),
                knob.metadata["allowed"].replace("|", "\\|"),
                " ".join(said),
            ]
            groups[list(groups)[-1]].append(row)
            said = []
        elif said:
            groups[" ".join(said)] = []
            said = []
    assert not knobs, knobs
    head = ("name", "default", "allowed", "what it does")
    return "\n".join(f"\n## {title}\n\n{markdown(head, rows)}" for title, rows in groups.items()) + "\n"


def default(knob: Any) -> str:
    """Its default as one would write it."""
    value = knob.default
    assert value is not MISSING, knob.name
    if isinstance(value, bool):
        value = int(value)
    shown = str(value).removeprefix(f"{ROOT}/").removesuffix(".0")
    return f"`{shown}`" if shown else "none"


def generation() -> str:
    """What GET /metrics has where texts are generated, beside the rest."""
    always = {row[0] for row in metric_rows(Settings())}
    rows = [row for row in metric_rows(Settings(TASK="text-generation")) if row[0] not in always]
    return markdown(("name", "kind", "labels", "what"), rows)


def metrics() -> str:
    """What GET /metrics has."""
    return markdown(("name", "kind", "labels", "what"), metric_rows(Settings()))


def metric_rows(settings: Settings) -> list[list[str]]:
    """What a server with these settings counts and watches."""
    counted = Metrics()

    async def serve() -> None:
        Service(settings, counted)

    asyncio.run(serve())
    rows = []
    for collector in counted.registry._collector_to_names:
        for family in collector.collect():
            if family.name.startswith("gpu_"):
                continue  # not on every machine
            name = family.name + "_total" * (family.type == "counter")
            labels = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
            rows.append([f"`{name}`", family.type, labels, family.documentation])
    return rows


def layers() -> str:
    """The layers that import-linter holds, drawn."""
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (found,) = (contract["layers"] for contract in linter["contracts"] if "layers" in contract)
    boxes = [" · ".join(map(shown, re.split(r" [|:] ", layer))) for layer in found]
    boxes[0] = f"server.py · {boxes[0]}"
    width = max(map(len, boxes))
    rows = f"\n├─{'─' * width}─┤\n".join(f"│ {box:{width}} │" for box in boxes)
    return f"```text\n┌─{'─' * width}─┐\n{rows}\n└─{'─' * width}─┘\n```"


def shown(module: str) -> str:
    return f"{module}/" if (ROOT / "workers" / module).is_dir() else module


def api_fields(known: dict[str, str], what: str = "what it does") -> str:
    """The fields of a request to an API."""
    return markdown(("field", what), ([f"`{name}`", meaning] for name, meaning in known.items()))


# The head that a task needs: a column of the table of architectures.
HEADS = {
    "fill-mask": "MaskedLM",
    "classification, zero-shot, reranking": "SequenceClassification",
    "token classification": "TokenClassification",
    "question answering": "QuestionAnswering",
    "embeddings, similarity": "Model",
}


def architectures() -> str:
    """The encoders that the tests make small and compare, with the tasks that each is tested in."""
    order = ("padding-free", "padded", "equal lengths")
    rows = [
        [
            f"`{family}`",
            batching(family),
            ", ".join(task for task, head in HEADS.items() if has(family, head)),
        ]
        for family in sorted(ARCHITECTURES, key=lambda family: (order.index(batching(family)), family))
    ]
    every = ", ".join(HEADS)
    body = [[*row[:2], "all" if row[2] == every else row[2]] for row in rows]
    return markdown(("`model_type`", "batches are", "tested in"), body)


SPOKEN = {"lang_to_id": {"<|de|>": 1, "<|en|>": 2}, "alignment_heads": [[0, 0]]}


def task_rules() -> list[tuple[str, str, dict[str, Rule]]]:
    """Each task, what it takes, and the rule of each of its parameters; kinds of models that take others are rows of their own."""
    texts = sorted(
        name.replace("_", "-") for _, name, _ in iter_modules(tasks.__path__) if name not in OTHER_FILES
    )
    rows = [(f"`{name}`", "text", cast(Any, tasks.make(Settings(TASK=name))).rules) for name in texts]
    embedder = cast(Any, tasks.make(Settings(TASK="feature-extraction", MODEL=MINILM)))
    rows.insert(1, ("`feature-extraction`, sentence-transformers", "text", embedder.rules))
    wave = {"architectures": ["Wav2Vec2ForCTC"]}
    whisper = {"model_type": "whisper"}
    for name, takes in TAKES.items():
        if name in texts:
            continue
        kinds: dict[str, Any] = {"": ({"model_type": "detr" if takes == "image" else "tapas"}, {})}
        if name == "automatic-speech-recognition":
            kinds = {", Whisper": (whisper, SPOKEN), ", CTC": (wave, {})}
        rows += [
            (f"`{name}`{kind}", takes, rules_of(name, Settings(), *files)) for kind, files in kinds.items()
        ]
    return rows


def parameters() -> str:
    """What may be sent of each task, and what each must be."""
    return markdown(
        ("task", "takes", "parameters"),
        [[name, takes, in_words(rules)] for name, takes, rules in task_rules()],
    )


def in_words(rules: dict[str, Any]) -> str:
    """Each parameter with its rule; those of one rule together."""
    by_rule: dict[str, list[str]] = {}
    for name, rule in rules.items():
        by_rule.setdefault(rule.words, []).append(f"`{name}`")
    said = "; ".join(f"{', '.join(names)}: {words}" for words, names in by_rule.items())
    return said.replace("de or en", "one of the model's languages, such as de") or "none"


def refused() -> str:
    """Transformers' tasks that are not served."""
    return markdown(
        ("task", "why it is not served"), [[f"`{task}`", why] for task, why in sorted(REFUSED.items())]
    )


TABLES: dict[str, Callable[[], str]] = {
    "guarantees": mode_matrix.table,
    "settings": settings,
    "metrics": metrics,
    "generation": generation,
    "layers": layers,
    "parameters": parameters,
    "refused": refused,
    "architectures": architectures,
    "cores": cores.table,
    "openai_fields": lambda: api_fields(openai.FIELDS),
    "chat_fields": lambda: api_fields(chat.CHAT_FIELDS),
    "completion_fields": lambda: api_fields(
        {name: what for name, what in chat.COMPLETION_FIELDS.items() if name not in chat.SAMPLED}
    ),
    "unsupported_fields": lambda: api_fields(chat.UNSUPPORTED, "what to do without it"),
    "transcription_fields": lambda: api_fields(transcriptions.FIELDS),
    "embed_fields": lambda: api_fields(embed.TEI_FIELDS),
    "cohere_embed_fields": lambda: api_fields(embed.COHERE_FIELDS),
    "response_fields": lambda: api_fields(responses.FIELDS),
    "rerank_fields": lambda: api_fields(rerank.FIELDS),
}

if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page(path.read_text()))
