"""MODEL=examples.torch_module:Neighbours BATCH_SIZE=32 uvicorn server:app -- an nn.Module with weights from a file.

$ curl --json '{"inputs": "paris", "parameters": {"top_k": 3}}' http://127.0.0.1:8000/
["paris","parisian","france"]
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Similar(nn.Module):
    """The nearest rows of a table of vectors, by cosine."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", nn.functional.normalize(table))

    def forward(self, rows: Tensor, n: int) -> Tensor:
        return (self.table[rows] @ self.table.T).topk(n).indices


class Neighbours:
    """The words that a model takes for the most similar ones."""

    example = "paris"

    def __init__(self, folder: str = "models/minilm-mlm") -> None:
        weights = load_file(Path(folder) / "model.safetensors")
        self.words = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]["vocab"]
        self.names = {number: word for word, number in self.words.items()}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.module = Similar(weights["bert.embeddings.word_embeddings.weight"]).to(self.device).eval()

    def check(self, inputs: Any, parameters: dict[str, Any]) -> tuple[int, int]:
        if inputs not in self.words:
            raise ValueError("the vocabulary does not have this word; send another")
        if not 1 <= (n := parameters.get("top_k", 5)) <= 100:
            raise ValueError('"top_k" must be from 1 to 100')
        return self.words[inputs], n

    @torch.inference_mode()
    def __call__(self, inputs: list[tuple[int, int]]) -> list[list[str]]:
        rows = torch.tensor([row for row, _ in inputs], device=self.device)
        found = self.module(rows, max(n for _, n in inputs)).tolist()
        return [[self.names[i] for i in some[:n]] for some, (_, n) in zip(found, inputs)]
