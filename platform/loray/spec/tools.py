"""Tools that a model may call: what an answer calls."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a step added to call number `index` of an answer: first id and name, then more of the arguments' JSON."""

    index: int
    id: str | None
    name: str | None
    arguments: str
