"""What text-generation-inference's client gets: run in its own environment by tests/test_chat_clients.py.

Its streamed chats need a role in each chunk, which OpenAI's clients would join to "assistantassistant…".
"""

import json
import sys

from text_generation import Client

url, text = sys.argv[1:]
client = Client(url.rstrip("/"), timeout=60)
stream = [one.token.text for one in client.generate_stream(text, max_new_tokens=9)]
messages = [{"role": "user", "content": text}]
print(
    json.dumps(
        {
            "a prompt": client.generate(text, max_new_tokens=9).generated_text,
            "a prompt, streamed": "".join(stream),
            "chat": client.chat(messages=messages, max_tokens=9, temperature=0.0).choices[0].message.content,
        }
    )
)
