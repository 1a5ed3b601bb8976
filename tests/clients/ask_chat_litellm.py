"""What LiteLLM gets by each of its names for such a server: run in its own environment by tests/test_chat_clients.py."""

import json
import sys

import litellm

url, text = sys.argv[1:]
known = {"api_base": url + "v1", "api_key": "none", "temperature": 0, "max_tokens": 9}
found = {}
for model in ("hosted_vllm/any", "openai/any"):
    asked = {"model": model, "messages": [{"role": "user", "content": text}], **known}
    found[model] = litellm.completion(**asked).choices[0].message.content
    stream = litellm.completion(**asked, stream=True)
    found[f"{model}, streamed"] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
completion = litellm.text_completion(model="text-completion-openai/any", prompt=text, **known)
found["a prompt"] = completion.choices[0].text
print(json.dumps(found))
