"""ONNX Runtime behind FastAPI's batch predictor: https://onnxruntime.ai/docs/get-started/with-python.html

    uvicorn loadtests.peers.onnx:app

`torch.onnx.export` writes the model once; the runtime optimises its graph, on the one core that it is given.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from loadtests.peers import model
from loadtests.peers.fastapi_batch import app  # noqa: F401  it calls model.load

FILE = Path(".peers/fill_mask.onnx")


def load(folder):
    if not FILE.exists():
        sizes = dict(enumerate(map(torch.export.Dim, ["batch", "tokens"])))
        ids, mask = torch.ones(2, 2, 8, dtype=torch.int64)  # one tensor for both would be one input
        net = AutoModelForMaskedLM.from_pretrained(folder, dtype="float32").eval()
        args = {"input_names": ["input_ids", "attention_mask"], "dynamic_shapes": (sizes, sizes)}
        torch.onnx.export(net, (ids, mask.clone()), FILE, **args, dynamo=True)
    tokenizer, session = AutoTokenizer.from_pretrained(folder), onnxruntime.InferenceSession(FILE)

    def predict(texts):
        inputs = dict(tokenizer(texts, padding=True, return_tensors="np", return_token_type_ids=False))
        rows, at = np.nonzero(inputs["input_ids"] == tokenizer.mask_token_id)
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
