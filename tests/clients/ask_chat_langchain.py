"""What LangChain's clients get: run in their own environment by tests/test_chat_clients.py."""

import json
import sys
import warnings

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI

warnings.simplefilter("error", UserWarning)  # of a usage that it can't add up
url, text = sys.argv[1:]
chat = ChatOpenAI(
    base_url=url + "v1", api_key="none", model="any", temperature=0, max_tokens=9, stream_usage=True
)
completion = OpenAI(base_url=url + "v1", api_key="none", model="any", temperature=0, max_tokens=9)
several = chat.generate([[HumanMessage(text)], [HumanMessage(text)]])
assert several.llm_output["token_usage"]["completion_tokens"] == 18
print(
    json.dumps(
        {
            "ChatOpenAI": chat.invoke(text).content,
            "ChatOpenAI, streamed": "".join(chunk.content for chunk in chat.stream(text)),
            "ChatOpenAI, several": several.generations[1][0].text,
            "OpenAI, a prompt": completion.invoke(text),
        }
    )
)
