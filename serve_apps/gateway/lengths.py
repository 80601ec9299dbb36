"""How many tokens of a request's prompt are taken, and how many it may write."""

from __future__ import annotations

from collections.abc import Sequence

from loray.api.openai.extras import NO_EXTRAS, Extras
from loray.api.openai.requests import GenerationRequest
from loray.engine.memory.limits import check_length
from loray.errors import RequestError


def max_tokens(request: GenerationRequest, num_prompt_tokens: int, limit: int, param: str) -> int:
    """The requested limit, else the API's default, at most what fits into the context.

    Raises RequestError for an empty prompt, and ContextLengthExceeded.
    """
    if not num_prompt_tokens:
        raise RequestError("the prompt is empty; give at least one token", param)
    requested = request.requested_max_tokens
    check_length(limit, num_prompt_tokens, 1 if requested is None else requested, param=param)
    left = limit - num_prompt_tokens
    return min(left, request.default_max_tokens or left) if requested is None else requested


def extras(request: GenerationRequest, prompts: Sequence[tuple[int, ...]]) -> Extras:
    usage = request.stream_options is not None and request.stream_options.continuous_usage_stats
    if not (usage or request.return_token_ids):
        return NO_EXTRAS
    of_choices = [prompt for prompt in prompts for _ in range(request.n)]
    return Extras(of_choices, request.return_token_ids, usage)


def num_kept(request: GenerationRequest, limit: int) -> int | None:
    """How many tokens of a longer prompt are taken, by `truncate_prompt_tokens`; None: it may not be longer."""
    given = request.truncate_prompt_tokens
    if given != -1:
        return given
    requested = request.requested_max_tokens
    return max(1, limit - ((request.default_max_tokens or 1) if requested is None else requested))
