"""What the tests share: the plain pipeline to compare with, a model that fails, many clients."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Crowd

from loadtests.modes import ROOT

MODEL = ROOT / "models" / "minilm-mlm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a server stays in one process: the tests of a file, or of a deployment mode in it."""
    for item in items:
        mode = getattr(item, "callspec", None) and item.callspec.params.get("mode")  # type: ignore[attr-defined]
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {mode or ''}"))


@pytest.fixture(scope="session")
def crowd() -> Iterator[Crowd]:
    with Crowd() as crowd:
        yield crowd


@pytest.fixture(scope="session")
def oracle() -> Any:
    """The plain pipeline, as anybody would make it."""
    import transformers

    return transformers.pipeline("fill-mask", model=str(MODEL), dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def sick_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model whose tokenizer knows one word more than its embedding: that word makes it raise."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("sick-model")
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    size = len(tokenizer)
    tokenizer.add_tokens(["[POISON]"])
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(str(folder))
    return folder
