"""Which requests an engine accepts."""

from __future__ import annotations

from itertools import chain

from loray.bases.registry import BaseModel
from loray.engine.memory.limits import check_length
from loray.errors import RequestError
from loray.spec import GenerateRequest


def check_request(request: GenerateRequest, base: BaseModel, *, max_model_len: int) -> None:
    """Raise for a request that could never run on `base`: RequestError, ContextLengthExceeded, BaseMismatch."""
    adapter, vocab = request.adapter, base.config.vocab_size
    if adapter is not None:
        adapter.check_base(base.name, base.fingerprint)
    if not request.prompt_ids:
        raise RequestError("the prompt is empty; give at least one token", param="prompt")
    if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab:
        raise RequestError(f"a token id is outside the vocabulary of {vocab}", param="prompt")
    params = request.params
    if not all(0 <= t < vocab for t in request.output_ids):
        raise RequestError(f"output_ids: a token id is outside the vocabulary of {vocab}", param="output_ids")
    if request.output_ids and len(request.output_ids) >= params.max_tokens:
        raise RequestError(
            f"the answer has {len(request.output_ids)} tokens and max_tokens is {params.max_tokens}; there is nothing "
            "to go on with",
            param="output_ids",
        )
    for param, ids in {
        "logit_bias": params.logit_bias,
        "stop_token_ids": params.stop_token_ids,
        "allowed_token_ids": params.allowed_token_ids or (),
        "bad_words": chain.from_iterable(params.bad_words),
    }.items():
        if not all(0 <= t < vocab for t in ids):
            raise RequestError(f"{param}: a token id is outside the vocabulary of {vocab}", param=param)
    num_prompt_tokens = len(request.prompt_ids)
    param = "max_tokens" if num_prompt_tokens < max_model_len else "prompt"
    check_length(max_model_len, num_prompt_tokens, request.params.max_tokens, param=param)
