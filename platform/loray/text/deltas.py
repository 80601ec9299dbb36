"""From the engine's tokens to text: the deltas of one request."""

from __future__ import annotations

from collections.abc import Sequence

from loray.spec import Delta, GenerateRequest, TokenDelta, TokenLogprob, TokenLogprobs, ToolCallDelta
from loray.text.detokenizer import Detokenizer
from loray.text.tokenizer import Tokenizer
from loray.text.tools import ToolParser


class RequestText:
    """The text of one request's tokens, in the order in which they come."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: GenerateRequest,
        tools: ToolParser | None = None,
        kept: frozenset[str] = frozenset(),
        *,
        tokens_as_ids: bool = False,
    ) -> None:
        """`kept`: special tokens that the parser must see, and so become text.

        `tokens_as_ids`: the texts of logprobs are `token_id:5` and so on.
        """
        self._text_of = _id_text if tokens_as_ids else tokenizer.text_of
        self._stop_tokens = request.params.stop_token_ids
        self._tools = tools
        self._has_calls = False
        self._prompt_ids = request.prompt_ids
        self._num_prompt_tokens = len(request.prompt_ids)
        self._has_logprobs = request.params.logprobs is not None
        self._detokenizer = Detokenizer(tokenizer, request.params, request.prompt_ids, kept)
        self._num_tokens = 0

    def push(self, delta: TokenDelta) -> Delta:
        """Adds the text. If a stop string ends it, the finish reason is "stop", and tokens after it do not count."""
        token_ids, reason = delta.token_ids, delta.finish_reason
        stop_reason: str | int | None
        text, num_tokens, stop_reason = self._detokenizer.push(token_ids, reason)
        if stop_reason is not None:
            reason = "stop"
            token_ids = token_ids[:num_tokens]
        elif reason == "stop" and token_ids and token_ids[-1] in self._stop_tokens:
            stop_reason = token_ids[-1]
        self._num_tokens += num_tokens
        calls: tuple[ToolCallDelta, ...] = ()
        if self._tools is not None:
            text, calls = self._without_calls(self._tools, text, ended=reason is not None)
            self._has_calls = self._has_calls or bool(calls)
            if self._has_calls and reason == "stop":
                reason = "tool_calls"
        logprobs = self._logprobs(token_ids, delta.logprobs) if self._has_logprobs else None
        of_prompt = None if delta.prompt_logprobs is None else self._of_prompt(delta.prompt_logprobs)
        # By position: with names it takes twice as long, and this is done for each token.
        return Delta(
            text,
            token_ids,
            logprobs,
            reason,
            self._num_prompt_tokens,
            self._num_tokens,
            delta.num_cached_tokens,
            of_prompt,
            calls,
            stop_reason,
        )

    @staticmethod
    def _without_calls(tools: ToolParser, text: str, *, ended: bool) -> tuple[str, tuple[ToolCallDelta, ...]]:
        parts = [*tools.push(text), *(tools.finish() if ended else ())]
        return (
            "".join(part for part in parts if isinstance(part, str)),
            tuple(part for part in parts if isinstance(part, ToolCallDelta)),
        )

    def _logprobs(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> tuple[TokenLogprob, ...]:
        return tuple(self._logprob(t, lp) for t, lp in zip(token_ids, logprobs or (), strict=False))

    def _of_prompt(self, logprobs: Sequence[TokenLogprobs]) -> tuple[TokenLogprob, ...]:
        first, *rest = self._prompt_ids
        known = tuple(self._logprob(t, lp) for t, lp in zip(rest, logprobs, strict=True))
        return (TokenLogprob(first, self._text_of(first), None, (), 0), *known)

    def _logprob(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        text_of = self._text_of
        top = tuple((t, text_of(t), lp) for t, lp in logprobs.top)
        return TokenLogprob(token_id, text_of(token_id), logprobs.logprob, top, logprobs.rank)


def _id_text(token_id: int) -> str:
    """vLLM's, of `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}"
