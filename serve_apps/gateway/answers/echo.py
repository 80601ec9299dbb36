"""`echo`: completions that begin with their prompt, in which evaluation harnesses read the prompt's logprobs."""

from __future__ import annotations

from collections.abc import Callable

from loray.api.openai import CompletionRequest
from loray.spec import Delta, TokenDelta, TokenLogprob
from loray.text.deltas import RequestText


class Echo:
    """A request's text, with the prompt's text and logprobs prepended to the first delta.

    `prompt` returns the text. It is called after the engine has accepted the prompt, because token ids may be invalid.
    """

    def __init__(self, text: RequestText, prompt: Callable[[], str], request: CompletionRequest) -> None:
        self._text, self._prompt, self._request = text, prompt, request
        self._is_first = True

    def push(self, tokens: TokenDelta) -> Delta:
        delta = self._text.push(tokens)
        if not self._is_first:
            return delta
        self._is_first = False
        return _with_prompt(delta, self._prompt(), self._request)


def _with_prompt(delta: Delta, prompt: str, request: CompletionRequest) -> Delta:
    """Prepends the prompt, with as many most likely tokens as each of `logprobs` and `prompt_logprobs` requests.

    The engine returns as many as the larger of the two requests.
    """
    prompt_logprobs = delta.prompt_logprobs or ()
    logprobs = delta.logprobs
    if request.logprobs is not None:
        logprobs = (*_best(prompt_logprobs, request.logprobs), *(logprobs or ()))
    num_top = request.prompt_logprobs
    return delta._replace(
        text=prompt + delta.text,
        logprobs=logprobs,
        prompt_logprobs=None if num_top is None else _best(prompt_logprobs, num_top),
    )


def _best(logprobs: tuple[TokenLogprob, ...], num_top: int) -> tuple[TokenLogprob, ...]:
    return tuple(lp._replace(top=lp.top[:num_top]) for lp in logprobs)
