"""LangChain, LlamaIndex, LiteLLM and text-generation, as their users install them: each gets the text that POST / gives.

Each runs `tests/clients/ask_chat_NAME.py`, which prints the texts that it got: the first of a chat, whole and streamed, or,
where the name says so, those that follow a prompt.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.modes import MODES, Server, start
from tests.support.client import post_json
from tests.support.environments import ask

pytestmark = pytest.mark.slow
TEXT = "the old dog"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from tests.support.small_language_models import save

    env = {
        "MODEL": save(tmp_path_factory.mktemp("model"), max_position_embeddings=2048),
        "TASK": "text-generation",
        "TORCH_THREADS": "1",
        "KV_CACHE_MB": "20",
        "DEADLINE_S": "60",
    }
    with start(MODES["thread"], env) as server:
        yield server


def expected(server: Server, prompt: str) -> str:
    parameters = {"max_new_tokens": 9, "return_full_text": False, "do_sample": False}
    return str(post_json(server, {"inputs": prompt, "parameters": parameters}).json[0]["generated_text"])


@pytest.mark.parametrize("name", ["langchain", "llama_index", "litellm", "text_generation"])
def test_framework_gets_the_text_whole_and_streamed(name: str, server: Server, tmp_path: Path) -> None:
    found: dict[str, Any] = json.loads(ask(f"chat_{name}", tmp_path, server.url, TEXT))
    chat = f"<|start|>user\n{TEXT}<|end|>\n<|start|>assistant\n"
    assert len(found) >= 3
    for what, text in found.items():
        assert text == expected(server, TEXT if "prompt" in what else chat), what
