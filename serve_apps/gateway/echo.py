"""`echo`: completions that begin with their prompt, in which evaluation harnesses read the prompt's logprobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from loray.api.openai import CompletionRequest
from loray.spec import Delta, TokenLogprob


async def echoed(
    deltas: AsyncGenerator[Delta, None], prompt: Callable[[], str], request: CompletionRequest
) -> AsyncGenerator[Delta, None]:
    """The same stream, with the prompt's text and logprobs prepended to the first delta.

    `prompt` returns the text. It is called after the engine has accepted the prompt, because token ids may be invalid.
    """
    first = True
    async with aclosing(deltas) as stream:
        async for delta in stream:
            yield _with_prompt(delta, prompt(), request) if first else delta
            first = False


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
