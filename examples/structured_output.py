"""An answer as an object: OpenAI's client with a pydantic model, and vLLM's `structured_outputs` for a choice.

loray up
python examples/structured_output.py
"""

from __future__ import annotations

import os
from typing import Literal

import openai
from pydantic import BaseModel, Field

MODEL = os.environ.get("MODEL", "smollm2")  # the base, or an adapter: tone, tone@prod, tone@3


class Ticket(BaseModel):
    subject: str = Field(max_length=40)
    urgency: Literal["low", "high"]


with openai.OpenAI(
    base_url=os.environ.get("LORAY_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("LORAY_API_KEY", "none"),
) as client:
    parsed = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "As a ticket: my parcel is damaged, and the party is tomorrow."}],
        response_format=Ticket,
        max_tokens=300,
    )
    print("ticket:", parsed.choices[0].message.parsed)
    chosen = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Is the mood of this good or bad? My parcel is damaged."}],
        extra_body={"structured_outputs": {"choice": ["good", "bad"]}},
    )
    print("mood:", chosen.choices[0].message.content)
