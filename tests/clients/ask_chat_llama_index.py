"""What LlamaIndex's client gets: run in its own environment by tests/test_chat_clients.py."""

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

url, text = sys.argv[1:]


def client(is_chat_model: bool) -> OpenAILike:
    return OpenAILike(
        api_base=url + "v1",
        api_key="none",
        model="any",
        is_chat_model=is_chat_model,
        temperature=0,
        max_tokens=9,
    )


messages = [ChatMessage(role="user", content=text)]
print(
    json.dumps(
        {
            "OpenAILike": client(True).chat(messages).message.content,
            "OpenAILike, streamed": "".join(one.delta or "" for one in client(True).stream_chat(messages)),
            "OpenAILike, a prompt": client(False).complete(text).text,
        }
    )
)
