"""Tools that a model may call: what a request offers, and what an answer calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ToolParserName = Literal["hermes", "llama3_json", "mistral"]


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. `parameters` is the JSON schema of its arguments; `strict`: they must be valid by it."""

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool in OpenAI's form, which chat templates read."""
        about = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about its tools, of which there is at least one.

    choice    auto: the model decides; required: it calls at least one; else the name of the one that it calls, once
    parallel  one answer may have several calls
    """

    tools: tuple[Tool, ...]
    choice: str = "auto"
    parallel: bool = True
    named: bool = False

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        return tuple(t for t in self.tools if t.name == self.choice) if self.named else self.tools

    @property
    def forced(self) -> bool:
        """The answer is calls and nothing else."""
        return self.named or self.choice == "required"

    @property
    def num_calls(self) -> int | None:
        """The largest number of calls of one answer; None: any."""
        return None if self.parallel and not self.named else 1


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """What a step added to call number `index` of an answer: first id and name, then more of the arguments' JSON."""

    index: int
    id: str | None
    name: str | None
    arguments: str
