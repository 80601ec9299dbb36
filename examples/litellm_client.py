"""LiteLLM's client: one call for many providers, of which this server is one. `pip install litellm`.

loray up
python examples/litellm_client.py
"""

from __future__ import annotations

import os

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched at the import

import litellm
import openai

MODEL = "openai/" + os.environ.get("MODEL", "smollm2")  # `openai/`: a server that speaks OpenAI's API

with openai.OpenAI(
    base_url=os.environ.get("LORAY_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("LORAY_API_KEY", "none"),
) as client:
    messages = [{"role": "user", "content": "Say hello."}]
    whole = litellm.completion(model=MODEL, messages=messages, max_tokens=16, client=client)
    print("answer:", whole.choices[0].message.content)
    print("tokens:", whole.usage.completion_tokens)
    for chunk in litellm.completion(model=MODEL, messages=messages, max_tokens=16, client=client, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
