"""vLLM's additions to OpenAI's answers, as far as a request asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from loray.api.openai.responses import ChatChoice, ChatChunkChoice, CompletionChoice, Usage
from loray.spec import Delta

C = TypeVar("C", CompletionChoice, ChatChoice, ChatChunkChoice)


@dataclass(frozen=True)
class Extras:
    """What one answer has more.

    prompts    the prompt of each choice; empty if the request asks for nothing of this
    token_ids  `return_token_ids`: those of the prompt and of the answer
    usage      `continuous_usage_stats`: the usage of a choice in each of its chunks
    """

    prompts: Sequence[tuple[int, ...]] = ()
    token_ids: bool = False
    usage: bool = False

    @property
    def any(self) -> bool:
        return self.token_ids or self.usage

    def prompt(self, index: int) -> dict[str, Any]:
        """Fields with the prompt of a choice."""
        return {"prompt_token_ids": list(self.prompts[index])} if self.token_ids else {}

    def usage_of(self, index: int, delta: Delta | None) -> Usage | None:
        """Of choice `index` until `delta`; None: before the first."""
        if not self.usage:
            return None
        return Usage.of(len(self.prompts[index]), 0 if delta is None else delta.num_output_tokens)

    def choice(self, choice: C, token_ids: Sequence[int], stop_reason: str | int | None) -> C:
        """The choice with its token ids, and with what stopped it, if that is not the end-of-text token."""
        more: dict[str, Any] = {"token_ids": list(token_ids)} if self.token_ids else {}
        if stop_reason is not None:
            more["stop_reason"] = stop_reason
        return choice.model_copy(update=more) if more else choice


NO_EXTRAS = Extras()
