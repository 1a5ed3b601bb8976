"""Make a model such as this one, from installable packages, in one command.

    $ python models/minilm-mlm/train.py --out my-mlm --minutes 6
    ...
    6,246,923 tokens to train on; bfloat16 on
         43,532 tokens      19 s  loss 7.277
    ...
      1,023,834 tokens     360 s  loss 5.066
    cloze sentences    n = 60      top 1 21.7 % ± 5.3    top 5 48.3 % ± 6.5
    held-out tokens    n = 8,925   top 1 24.7 % ± 0.5    top 5 42.3 % ± 0.5

Without `--minutes` it reads 16.4 M tokens, as the model in this folder did. `corpus.py` says what it needs to
fetch the text. Result: a Hugging Face folder, float16 on disk. Its weights differ from run to run and machine
to machine; the model in this folder is one such run and not to be had again bit for bit.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import corpus
import evaluate
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerBase, logging

HERE = Path(__file__).parent
MAX_LENGTH = 128  # tokens of a text
BATCH_TOKENS = 2048
LEARNING_RATE, HEAD_LEARNING_RATE = 4e-4, 1.5e-3
WARM_UP = 0.03  # of the run
FREQUENT, SAMPLED = 5000, 2500  # words in each step's softmax: always, and by chance


def build_model(weights: Path, counts: Tensor) -> BertForMaskedLM:
    """The sentence encoder in `weights` under a new BERT head, which starts from the words' frequencies."""
    config = BertConfig.from_pretrained(HERE)  # hidden sizes and vocabulary are the encoder's own
    model = BertForMaskedLM.from_pretrained(
        weights, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    head = model.cls.predictions
    head.bias.data.copy_(((counts + 0.1) / (counts + 0.1).sum()).log())
    # The output layer is the word embeddings: moving them would cost a gradient of 11.7 M numbers a step, and rare
    # words would drift away from where the encoder learned to expect them. Positions past 128 are never seen here.
    model.bert.embeddings.requires_grad_(False)
    return model.train()


class SampledLoss:
    """Cross-entropy over frequent words and a sample of the rest: the full softmax is a third of a CPU's step."""

    def __init__(self, model: BertForMaskedLM, counts: Tensor) -> None:
        order = counts.argsort(descending=True)
        self.head = model.cls.predictions
        self.frequent, self.rare = order[:FREQUENT], order[FREQUENT:]
        self.is_rare = torch.ones_like(counts, dtype=torch.bool)
        self.is_rare[self.frequent] = False
        weights = counts[self.rare] + 0.1
        self.chance = weights / weights.sum()

    def __call__(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The loss of `hidden` (n by 384), whose right words are `targets` (n)."""
        hidden, words = self.head.transform(hidden), self.head.decoder.weight
        drawn = self.chance.multinomial(SAMPLED, replacement=True)
        sample = self.rare[drawn]
        seen = torch.cat([self.frequent, sample])
        logits = linear(hidden, words[seen], self.head.bias[seen]).float()
        right = (hidden.float() * words[targets]).sum(1) + self.head.bias[targets]
        # A word drawn with chance q counts 1/(kq)-fold, which makes the sum an unbiased estimate of the rest's.
        # A rare right word has its own column, so it must not be drawn as a wrong one as well.
        logits[:, FREQUENT:] -= (SAMPLED * self.chance[drawn]).log()
        logits[:, FREQUENT:].masked_fill_(sample == targets.unsqueeze(1), -torch.inf)
        own = right.masked_fill(~self.is_rare[targets], -torch.inf)
        return (torch.cat([logits, own.unsqueeze(1)], 1).logsumexp(1) - right).mean()


def encode(tokenizer: PreTrainedTokenizerBase, path: Path) -> list[list[int]]:
    texts = path.read_text().splitlines()
    return tokenizer(texts, truncation=True, max_length=MAX_LENGTH, add_special_tokens=True).input_ids


def batches(texts: list[list[int]], pad: int, rng: random.Random) -> Iterator[Tensor]:
    """Epochs without end of texts by tokens, of like lengths, so that hardly any of the 2,048 is padding."""
    while True:
        rng.shuffle(texts)
        ready: list[list[list[int]]] = [[]]
        for start in range(0, len(texts), 4096):  # sorted within a pool: neighbours by length, yet mixed
            for text in sorted(texts[start : start + 4096], key=len):
                if (len(ready[-1]) + 1) * len(text) > BATCH_TOKENS:
                    ready.append([])
                ready[-1].append(text)
            ready.append([])
        rng.shuffle(ready)
        for batch in filter(None, ready):
            longest = max(map(len, batch))
            yield torch.tensor([text + [pad] * (longest - len(text)) for text in batch])


def mask(ids: Tensor, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Some 22 to 28 % of the words masked: the ids, and where. Always [MASK]: nothing else is ever asked."""
    special = torch.tensor(tokenizer.all_special_ids)
    masked = (torch.rand(ids.shape) < rng.uniform(0.22, 0.28)) & ~torch.isin(ids, special)
    return ids.masked_fill(masked, tokenizer.mask_token_id), masked


def bfloat16_is_fast() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def optimizer_for(model: BertForMaskedLM) -> torch.optim.AdamW:
    body = [p for p in model.bert.parameters() if p.requires_grad]
    head = [*model.cls.predictions.transform.parameters(), model.cls.predictions.bias]
    groups = [{"params": body, "lr": LEARNING_RATE}, {"params": head, "lr": HEAD_LEARNING_RATE}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


def rate(done: float) -> float:
    """The learning rate's factor when `done` (0 to 1) of the run is behind: a short rise, a line to nought."""
    return min(done / WARM_UP + 0.01, (1 - done) / (1 - WARM_UP)) if done < 1 else 0.0


def train(
    model: BertForMaskedLM,
    texts: list[list[int]],
    counts: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, float], float],
) -> None:
    """Train until `progress(tokens seen, seconds)` reaches 1; print the mean loss now and then."""
    rng, seen, began, told = random.Random(0), 0, time.monotonic(), 0.0
    losses: list[float] = []
    loss_of, optimizer, autocast = SampledLoss(model, counts), optimizer_for(model), bfloat16_is_fast()
    for ids in batches(texts, tokenizer.pad_token_id, rng):
        seconds = time.monotonic() - began
        done = progress(seen, seconds)
        if losses and (done >= told + 0.05 or done >= 1):
            print(f"{seen:>11,} tokens  {seconds:>6.0f} s  loss {sum(losses) / len(losses):.3f}", flush=True)
            told, losses = done, []
        if done >= 1:
            return
        for group, base in zip(optimizer.param_groups, (LEARNING_RATE, HEAD_LEARNING_RATE), strict=True):
            group["lr"] = base * rate(done)
        inputs, masked = mask(ids, tokenizer, rng)
        if not masked.any():
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.bert(inputs, attention_mask=ids != tokenizer.pad_token_id).last_hidden_state
            loss = loss_of(hidden[masked], ids[masked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seen += int((ids != tokenizer.pad_token_id).sum())


def save(model: BertForMaskedLM, out: Path) -> None:
    """The folder that `pipeline("fill-mask", model=out)` loads: float16 weights, and this folder's tokenizer."""
    model.eval().half().save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(HERE / name, out / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, made if need be")
    parser.add_argument("--work", type=Path, default=Path("work"), help="folder of downloads and texts")
    parser.add_argument("--tokens", type=float, default=16.4e6, help="tokens to train on (default 16.4e6)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then, if before --tokens")
    arguments = parser.parse_args()
    if arguments.out.resolve() == HERE:
        parser.error("--out would overwrite the model that is there: name another folder")

    torch.manual_seed(0)
    logging.set_verbosity_error()  # it would warn that the encoder comes without a head: making one is the point
    train_text, held_out = corpus.build(arguments.work)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    texts = encode(tokenizer, train_text)
    counts = torch.bincount(
        torch.tensor([i for text in texts for i in text[1:-1]]), minlength=len(tokenizer)
    ).float()
    model = build_model(next(corpus.fetch("minilm", arguments.work).glob("*/model")), counts)
    print(
        f"{int(counts.sum()):,} tokens to train on; bfloat16 {'on' if bfloat16_is_fast() else 'off'}",
        flush=True,
    )
    train(
        model,
        texts,
        counts,
        tokenizer,
        lambda seen, seconds: max(seen / arguments.tokens, seconds / (60 * arguments.minutes)),
    )
    save(model, arguments.out)
    evaluate.report(arguments.out, held_out)


if __name__ == "__main__":
    main()
