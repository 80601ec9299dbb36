"""An answer as it streams in: its text, and how fast it came."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loray.client import LorayClient
from loray.spec import format_seconds


@dataclass(slots=True)
class Answer:
    """`ttft_s`: from the request to the first text. `num_tokens`: as the server counts them; 0 before the end."""

    model: str
    text: str = ""
    error: str | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    num_tokens: int = 0

    @property
    def figures(self) -> str:
        """Tokens, tokens a second after the first, and the time to the first."""
        if self.ttft_s is None:
            return f"{self.num_tokens} tokens"
        after = self.total_s - self.ttft_s
        rate = f", {(self.num_tokens - 1) / after:,.1f} tokens/s" if self.num_tokens > 1 and after > 0 else ""
        return f"{self.num_tokens} tokens{rate}, first after {format_seconds(self.ttft_s)}"

    def to_json(self) -> dict[str, Any]:
        """Seconds and tokens; `error` is null where there is none."""
        return asdict(self)


def printable(text: str) -> str:
    """Without control characters, by which a text could change what a terminal shows; lines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def stream(
    client: LorayClient,
    answer: Answer,
    messages: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    show: Callable[[str], None],
) -> None:
    """Fills `answer`; `show` gets each piece of text as a terminal may have it. Raises what the client raises."""
    began = time.monotonic()
    chunks = client.stream_chat(answer.model, messages, stream_options={"include_usage": True}, **options)
    for chunk in chunks:
        for choice in chunk.choices:
            piece = choice.delta.content
            if piece:
                if answer.ttft_s is None:
                    answer.ttft_s = time.monotonic() - began
                answer.text += piece
                show(printable(piece))
        if chunk.usage is not None:
            answer.num_tokens = chunk.usage.completion_tokens
    answer.total_s = time.monotonic() - began
