"""ONNX Runtime behind FastAPI's batch predictor: https://onnxruntime.ai/docs/get-started/with-python.html

    uvicorn loadtests.peers.onnx:app

`torch.onnx.export` writes the model once; the runtime optimises its graph, on the one core that it is given.
PEER_HEAD=mask: a graph whose head runs at the masks only.
"""

import os
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from loadtests.peers import model
from loadtests.peers.fastapi_batch import app  # noqa: F401  it calls model.load

AT_MASK = os.environ.get("PEER_HEAD") == "mask"
FILE = Path(f".peers/fill_mask{'_at_mask' * AT_MASK}.onnx")


class AtMask(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, input_ids, attention_mask, rows, at):
        return self.net.cls(self.net.bert(input_ids, attention_mask).last_hidden_state[rows, at])


def export(folder):
    batch, tokens, masks = map(torch.export.Dim, ["batch", "tokens", "masks"])
    ids, mask = torch.ones(2, 3, 8, dtype=torch.int64)  # one tensor for both would be one input
    net = AutoModelForMaskedLM.from_pretrained(folder, dtype="float32").eval()
    inputs, sizes = (ids, mask.clone()), ({0: batch, 1: tokens},) * 2
    if AT_MASK:
        # The head's weights are the embeddings': as a table of their own they can be laid out for a product.
        head = net.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        net, inputs, sizes = (
            AtMask(net).eval(),
            (*inputs, torch.arange(3), torch.arange(3)),
            (*sizes, {0: masks}, {0: masks}),
        )
    names = ["input_ids", "attention_mask", "rows", "at"][: len(inputs)]
    torch.onnx.export(net, inputs, FILE, input_names=names, dynamic_shapes=sizes, dynamo=True)


def load(folder):
    if not FILE.exists():
        export(folder)
    tokenizer, session = AutoTokenizer.from_pretrained(folder), onnxruntime.InferenceSession(FILE)

    def predict(texts):
        inputs = dict(tokenizer(texts, padding=True, return_tensors="np", return_token_type_ids=False))
        rows, at = np.nonzero(inputs["input_ids"] == tokenizer.mask_token_id)
        if AT_MASK:
            (logits,) = session.run(None, inputs | {"rows": rows, "at": at})
        else:
            logits = session.run(None, inputs)[0][rows, at]
        return [five(inputs["input_ids"][row].copy(), i, each) for row, i, each in zip(rows, at, logits)]

    def five(ids, i, logits):
        odds = np.exp(logits - logits.max())

        def filled(token):
            ids[i] = token
            return {"score": float(odds[token] / odds.sum()), "token": token, "token_str": tokenizer.decode([token]),
                    "sequence": tokenizer.decode(ids, skip_special_tokens=True)}  # fmt: skip

        return [filled(token) for token in np.argsort(-logits)[:5].tolist()]

    return predict


model.stock = load
