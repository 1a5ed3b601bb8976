"""make chat -- a small chat model, and this: its answer as it is written, by the openai client.

$ pip install openai
$ python examples/chat.py "Name a city in France."
…
"""

import sys
from collections.abc import Iterator

import openai


def answer(question: str, url: str = "http://127.0.0.1:8000") -> Iterator[str]:
    """The answer, piece by piece. Leave the loop to stop the model."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages = [{"role": "user", "content": question}]
    for chunk in client.chat.completions.create(
        model="any", messages=messages, max_tokens=30, temperature=0, stream=True
    ):
        if chunk.choices and (piece := chunk.choices[0].delta.content):
            yield piece


if __name__ == "__main__":
    for piece in answer(*sys.argv[1:]):
        print(piece, end="", flush=True)
    print()
