"""Detokenizing: the text of a request's tokens, which stop strings end, as deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loray.spec import (
    Delta,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Thinking,
    TokenDelta,
    TokenLogprob,
    TokenLogprobs,
    ToolCallDelta,
)
from loray.text.reasoning import ContentDecoder, ThoughtText
from loray.text.tokenizer import Tokenizer
from loray.text.tools import ToolParser, overlap


class Text(NamedTuple):
    """New text that is certain, from the first `num_tokens` of the pushed ones.

    `stop`: a stop string that was found; neither text nor tokens follow.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class Detokenizer:
    """A decoder that looks for stop strings. Text that may be the beginning of one, or part of a character, waits.

    As in vLLM, a stop string that begins in the first `min_tokens` tokens does not count.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        prompt_ids: Sequence[int] = (),
        kept: frozenset[str] = frozenset(),
    ) -> None:
        """`kept`: special tokens that become text although `params` skips special tokens."""
        self._decoder = tokenizer.decoder(prompt_ids, skip_special_tokens=params.skip_special_tokens, kept=kept)
        self._keeps_stop = params.include_stop_str_in_output
        self._stop = params.stop
        self._num_free = params.min_tokens  # tokens from now on in which no stop string counts
        self._held = ""

    def begin(self, num_before: int) -> None:
        """Let the text begin after a thought of so many tokens, and the newlines behind it."""
        self._num_free -= num_before
        self._decoder = ContentDecoder(self._decoder)

    def push(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> Text:
        """The text of tokens; with a finish reason also the rest. A token that stops the request has no text."""
        written = token_ids[:-1] if finish_reason == "stop" and not self._keeps_stop else token_ids
        if not self._stop:
            text = self._decoder.push(written)
            if finish_reason is not None:
                text += self._decoder.flush()
            return Text(text, len(token_ids))
        pieces = []
        for i, token in enumerate(written):
            text, stop = self._until_stop(self._decoder.push((token,)), counts=self._num_free <= 0, final=False)
            self._num_free -= 1
            pieces.append(text)
            if stop is not None:
                return Text("".join(pieces), i + 1, stop)
        if finish_reason is None:
            return Text("".join(pieces), len(token_ids))
        text, stop = self._until_stop(self._decoder.flush(), counts=self._num_free < 0, final=True)
        return Text("".join([*pieces, text]), len(token_ids), stop)

    def _until_stop(self, new: str, *, counts: bool, final: bool) -> tuple[str, str | None]:
        """The part of the text that is certain, and the stop string that ended it."""
        text = self._held + new
        stop = self._stop if counts else ()
        found = [(i, i + len(s), s) for s in stop if (i := text.find(s)) >= 0]
        if found:
            self._held = ""
            start, end, which = min(found)
            return text[: end if self._keeps_stop else start], which
        hold = 0 if final else max((overlap(text, s) for s in stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None


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
        thinking: Thinking | None = None,
        include_reasoning: bool = True,
    ) -> None:
        """`kept`: special tokens that the parser must see, and so become text.

        `tokens_as_ids`: the texts of logprobs are `token_id:5` and so on. `thinking`: of a model that thinks; its
        thought is left out without `include_reasoning`.
        """
        self._text_of = _id_text if tokens_as_ids else tokenizer.text_of
        self._stop_tokens = request.params.stop_token_ids
        self._tools = tools
        self._has_calls = False
        self._prompt_ids = request.prompt_ids
        self._num_prompt_tokens = len(request.prompt_ids)
        self._has_logprobs = request.params.logprobs is not None
        self._detokenizer = Detokenizer(tokenizer, request.params, request.prompt_ids, kept)
        self._num_tokens = self._num_reasoning_tokens = 0
        self._thought: ThoughtText | None = None  # until the content begins
        if thinking is not None:
            self._thought = ThoughtText(tokenizer, thinking, request.params, request.prompt_ids)
        self._include_reasoning = include_reasoning

    def push(self, delta: TokenDelta) -> Delta:
        """The delta with its text. If a stop string ends it, its reason is "stop", and tokens after it do not count."""
        token_ids, reason = delta.token_ids, delta.finish_reason
        stop_reason: str | int | None
        if self._thought is None:
            thought = ""
            text, num_tokens, stop_reason = self._detokenizer.push(token_ids, reason)
        else:
            thought, num_thought = self._think(token_ids, reason)
            text, num_tokens, stop_reason = self._detokenizer.push(token_ids[num_thought:], reason)
            num_tokens += num_thought
        if stop_reason is not None:
            reason = "stop"
            token_ids = token_ids[:num_tokens]
        elif reason == "stop" and token_ids and token_ids[-1] in self._stop_tokens:
            stop_reason = token_ids[-1]
        self._num_tokens += num_tokens
        calls: tuple[ToolCallDelta, ...] = ()
        if self._tools is not None:
            parts = [*self._tools.push(text), *(self._tools.finish() if reason is not None else ())]
            text = "".join(part for part in parts if isinstance(part, str))
            calls = tuple(part for part in parts if isinstance(part, ToolCallDelta))
            self._has_calls = self._has_calls or bool(calls)
            if self._has_calls and reason == "stop":
                reason = "tool_calls"
        logprobs = None
        if self._has_logprobs:
            pairs = zip(token_ids, delta.logprobs or (), strict=False)
            logprobs = tuple(self._logprob(token, given) for token, given in pairs)
        prompt_logprobs = None if delta.prompt_logprobs is None else self._prompt_logprobs(delta.prompt_logprobs)
        # By position: with names it takes twice as long, and this is done for each token.
        return Delta(
            text,
            token_ids,
            logprobs,
            reason,
            self._num_prompt_tokens,
            self._num_tokens,
            delta.num_cached_tokens,
            prompt_logprobs,
            calls,
            stop_reason,
            thought,
            self._num_reasoning_tokens,
        )

    def _think(self, token_ids: Sequence[int], reason: FinishReason | None) -> tuple[str, int]:
        """The thought's new text, and how many of the tokens are before the content."""
        assert self._thought is not None
        text, num_tokens = self._thought.push(token_ids, reason)
        reader = self._thought.reader
        self._num_reasoning_tokens = reader.num_tokens
        if reader.content_from is not None:
            self._thought = None
            if reader.content_from:
                self._detokenizer.begin(reader.content_from)
        return text if self._include_reasoning else "", num_tokens

    def _prompt_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> tuple[TokenLogprob, ...]:
        first, *rest = self._prompt_ids
        known = tuple(self._logprob(t, lp) for t, lp in zip(rest, logprobs, strict=True))
        return (TokenLogprob(first, self._text_of(first), None, (), 0), *known)

    def _logprob(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        text_of = self._text_of
        top = tuple((t, text_of(t), lp) for t, lp in logprobs.top)
        return TokenLogprob(token_id, text_of(token_id), logprobs.logprob, top, logprobs.rank)


def _id_text(token_id: int) -> str:
    """The text of a token as vLLM has it for `return_tokens_as_token_ids`."""
    return f"token_id:{token_id}"
