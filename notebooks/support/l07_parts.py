"""Where does a call's time go? The steps of five tasks in plain Transformers, and small models to try them on."""

import contextlib
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from lesson import BLUE, GREY, ORANGE, PURPLE, RED, SKY, bars, guessed, picture, whose

from workers.settings import EMBEDDED
from workers.web.replies import rendered

PARTS = ("tokenise", "pad", "forward", "head", "answer", "serialise")
KINDS = {  # a task, and the class of Transformers that has its head
    "fill-mask": "BertForMaskedLM",
    "text-classification": "BertForSequenceClassification",
    "token-classification": "BertForTokenClassification",
    "a vector a text": "BertModel",
    "a vector a token": "BertModel",
}
LABELS = {"text-classification": ["good", "bad"], "token-classification": ["O", "B-LOC", "I-LOC"]}


def make(folder, task):
    """Save the embedded model's encoder under the head of another task, whose weights are random; return where."""
    path = str(Path(folder) / task.replace(" ", "-"))
    labels = LABELS.get(task, ["one", "two"])
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    torch.manual_seed(0)
    getattr(transformers, KINDS[task]).from_pretrained(EMBEDDED, **names).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(path)
    if task == "a vector a text":  # what sentence-transformers writes beside a model: the mean, of length 1
        modules = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        lines = [{"type": f"sentence_transformers.models.{kind}", "path": at} for kind, at in modules.items()]
        (Path(path) / "1_Pooling").mkdir()
        (Path(path) / "modules.json").write_text(json.dumps(lines))
        (Path(path) / "1_Pooling" / "config.json").write_text(
            json.dumps({"embedding_dimension": 384, "pooling_mode": "mean"})
        )
    return path


def load(path, task):
    """The model and its tokenizer."""
    model = getattr(transformers, KINDS[task]).from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def heads(task, model, states):
    """What the head makes of the encoder's states."""
    match task:
        case "fill-mask":
            return model.cls(states.last_hidden_state)
        case "text-classification":
            return model.classifier(states.pooler_output)
        case "token-classification":
            return model.classifier(states.last_hidden_state)
    return states.last_hidden_state


def answers(task, model, tokenizer, batch, found):
    """The numbers in a client's words."""
    lengths = batch["attention_mask"].sum(1).tolist()
    if task == "a vector a token":
        return [states[:n].numpy() for states, n in zip(found, lengths)]
    if task == "a vector a text":
        means = torch.stack([states[:n].mean(0) for states, n in zip(found, lengths)])
        return list(torch.nn.functional.normalize(means, dim=-1).numpy())
    if task == "fill-mask":
        found = found[batch["input_ids"] == tokenizer.mask_token_id]
        scores, tokens = found.softmax(-1).topk(5)
        pairs = [list(zip(*both)) for both in zip(scores.tolist(), tokens.tolist())]
        return [[{"score": s, "token_str": tokenizer.decode([t])} for s, t in some] for some in pairs]
    scores, best = found.softmax(-1).max(-1)
    names = model.config.id2label
    if task == "text-classification":
        return [{"label": names[i], "score": s} for i, s in zip(best.tolist(), scores.tolist())]
    ids = batch["input_ids"].tolist()
    return [
        [
            {"entity": names[i], "score": s, "word": word}
            for i, s, word in zip(*row[:2], tokenizer.convert_ids_to_tokens(row[2][:n]))
        ]
        for *row, n in zip(best.tolist(), scores.tolist(), ids, lengths)
    ]


@torch.inference_mode()
def time_parts(path, task, texts, times):
    """The median milliseconds of each part of a call with these texts, and the reply's bytes."""
    model, tokenizer = load(path, task)
    took = defaultdict(list)

    @contextlib.contextmanager
    def clock(part):
        began = time.perf_counter()
        yield
        took[part].append((time.perf_counter() - began) * 1000)

    for _ in range(times + 1):  # the first call pays for buffers and kernels
        with clock("tokenise"):
            rows = tokenizer(texts)
        with clock("pad"):
            batch = tokenizer.pad(rows, return_tensors="pt")
        with clock("forward"):
            states = model.base_model(**batch)
        with clock("head"):
            found = heads(task, model, states)
        with clock("answer"):
            said = answers(task, model, tokenizer, batch, found)
        with clock("serialise"):
            body = rendered(said)
    padding = 1 - float(batch["attention_mask"].float().mean())
    return {part: sorted(took[part][1:])[times // 2] for part in PARTS}, len(body), padding


def draw(share, predicted, guess):
    """A bar for each task, of the parts' shares of a call; where the head of fill-mask begins, as predicted and as guessed."""
    rows = list(KINDS)[::-1]
    with picture("Almost all is the encoder, but for fill-mask's head", "% of the call", "") as ax:
        left = [0.0] * len(rows)
        shown = {"tokenise, pad": GREY, "forward": SKY, "head": ORANGE, "answer": RED, "serialise": BLUE}
        for name, color in shown.items():
            widths = [100 * sum(share[task][part] for part in name.split(", ")) for task in rows]
            ax.barh(rows, widths, left=left, color=color, height=0.5)
            left = [a + b for a, b in zip(left, widths)]
        for x, (name, color) in zip((0, 32, 51, 63, 82), shown.items()):
            ax.text(x, len(rows) - 0.05, name, color=color, fontsize=12, weight="bold")
        bars(ax, [100 - predicted], [len(rows) - 1], None)
        guessed(ax, [100 - guess], [len(rows) - 1], None)
        # The one above and the other below: they may be close.
        middle = {"ha": "center", "va": "center", "fontsize": 12}
        ax.text(100 - predicted, len(rows) - 0.5, "predicted", **middle)
        ax.text(100 - guess, len(rows) - 1.5, whose("your guess"), color=PURPLE, **middle)
        ax.set(xlim=(0, 100), ylim=(-0.5, len(rows) + 0.3))
