"""ONNX Runtime behind FastAPI's batch predictor: https://onnxruntime.ai/docs/get-started/with-python.html

    uvicorn loadtests.peers.onnx:app

`torch.onnx.export` writes the model once; the runtime optimises its graph; tokenizer and top five are written by hand.
"""

import os
from pathlib import Path

import numpy as np

from loadtests.peers import model
from loadtests.peers.fastapi_batch import app  # noqa: F401  it calls model.load

FILE = Path(os.environ.get("PEER_CACHE", ".peers")) / "fill_mask.onnx"


def export(folder):
    import torch
    from transformers import AutoModelForMaskedLM

    names, sizes = ["input_ids", "attention_mask"], {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    inputs = tuple(torch.ones(2, 8, dtype=torch.int64) for _ in names)
    net = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    torch.onnx.export(net, inputs, FILE, input_names=names, output_names=["logits"], dynamic_shapes=(sizes, sizes), dynamo=True)


def load(folder):
    import onnxruntime
    from transformers import AutoTokenizer

    FILE.exists() or export(folder)
    tokenizer, options = AutoTokenizer.from_pretrained(folder), onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(FILE, options)

    def predict(texts):
        inputs = dict(tokenizer(texts, padding=True, return_tensors="np", return_token_type_ids=False))
        rows, at = np.nonzero(inputs["input_ids"] == tokenizer.mask_token_id)
        [logits] = session.run(None, inputs)
        return [answer(inputs["input_ids"][row].copy(), i, logits[row, i]) for row, i in zip(rows, at, strict=True)]

    def answer(ids, i, logits):
        odds, best = np.exp(logits - logits.max()), np.argsort(-logits)[:5]
        found = []
        for token in best.tolist():
            ids[i] = token
            found.append({"score": float(odds[token] / odds.sum()), "token": token, "token_str": tokenizer.decode([token]),
                          "sequence": tokenizer.decode(ids, skip_special_tokens=True)})  # fmt: skip
        return found

    return predict


model.stock = load
