"""From the engine's tokens to text: the deltas of one request."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from loray.spec import Delta, GenerateRequest, TokenDelta, TokenLogprob, TokenLogprobs
from loray.text.detokenizer import Detokenizer
from loray.text.tokenizer import Tokenizer


class RequestText:
    """The text of one request's tokens, in the order in which they come."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        self._tokenizer, self._request = tokenizer, request
        self._detokenizer = Detokenizer(tokenizer, request.params, request.prompt_ids)
        self._num_tokens = 0

    def push(self, delta: TokenDelta) -> Delta:
        """Adds the text. If a stop string ends it, the finish reason is "stop", and tokens after it do not count."""
        pieces, reason, num_taken = [], delta.finish_reason, 0
        last = len(delta.token_ids) - 1
        for i, token in enumerate(delta.token_ids):
            text, stopped = self._detokenizer.step(token, delta.finish_reason if i == last else None)
            pieces.append(text)
            num_taken = i + 1
            if stopped:
                reason = "stop"
                break
        if last < 0 and delta.finish_reason is not None:
            pieces.append(self._detokenizer.step(None, delta.finish_reason).text)
        self._num_tokens += num_taken
        token_ids = delta.token_ids[:num_taken]
        return Delta(
            text="".join(pieces),
            token_ids=token_ids,
            logprobs=self._logprobs(token_ids, delta.logprobs),
            finish_reason=reason,
            num_prompt_tokens=len(self._request.prompt_ids),
            num_output_tokens=self._num_tokens,
            num_cached_tokens=delta.num_cached_tokens,
            prompt_logprobs=self._prompt_logprobs(delta.prompt_logprobs),
        )

    def _logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None
    ) -> tuple[TokenLogprob, ...] | None:
        if self._request.params.logprobs is None:
            return None
        return tuple(self._logprob(t, lp) for t, lp in zip(token_ids, logprobs or (), strict=False))

    def _prompt_logprobs(self, logprobs: Sequence[TokenLogprobs] | None) -> tuple[TokenLogprob, ...] | None:
        if logprobs is None:
            return None
        first, *rest = self._request.prompt_ids
        known = tuple(self._logprob(t, lp) for t, lp in zip(rest, logprobs, strict=True))
        return (TokenLogprob(first, self._tokenizer.text_of(first), None, (), 0), *known)

    def _logprob(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        text_of = self._tokenizer.text_of
        top = tuple((t, text_of(t), lp) for t, lp in logprobs.top)
        return TokenLogprob(token_id, text_of(token_id), logprobs.logprob, top, logprobs.rank)


async def texts(
    tokenizer: Tokenizer, request: GenerateRequest, deltas: AsyncGenerator[TokenDelta, None]
) -> AsyncGenerator[Delta, None]:
    """The deltas with their text. A stop string ends the stream, and closing `deltas` cancels the request."""
    text = RequestText(tokenizer, request)
    async with aclosing(deltas) as stream:
        async for tokens in stream:
            delta = text.push(tokens)
            yield delta
            if delta.finish_reason is not None:
                return
