"""How a pool is cut into blocks, and how long a request may be. The gateway checks this before it sends a request."""

from __future__ import annotations

from loray.bases.config import ModelConfig
from loray.engine.memory.blocks import Geometry
from loray.errors import ContextLengthExceeded, SpecError
from loray.spec import ServeSpec


def pool_geometry(spec: ServeSpec, config: ModelConfig) -> Geometry:
    """Return the geometry of a pool of `fixed_pool_bytes`, which are known. A block holds K and V of `block_tokens`
    tokens for each layer.

    Raises SpecError if the pool has fewer than two blocks.
    """
    pool_bytes, size = spec.fixed_pool_bytes, block_bytes(spec, config)
    assert pool_bytes is not None, "the device has not been asked"
    num_blocks = pool_bytes // size
    if num_blocks < 2:
        raise SpecError(f"pool_bytes={pool_bytes} holds {num_blocks} blocks of {size} bytes; give at least 2")
    return Geometry(num_blocks, config.num_layers, spec.block_tokens, _layer_share(spec, config))


def block_bytes(spec: ServeSpec, config: ModelConfig) -> int:
    """Return the bytes of a block of the pool."""
    return config.num_layers * _layer_share(spec, config) * spec.element_bytes


def _layer_share(spec: ServeSpec, config: ModelConfig) -> int:
    """Return the elements of a block's share of a layer, which `KvLayout` of the kernels has with torch."""
    heads = 2 * spec.block_tokens * config.num_kv_heads
    if spec.int8_per_element:
        return heads * (config.head_dim + 4) // spec.int8_per_element
    return heads * config.head_dim


def tokens_of_a_request(config: ModelConfig, geometry: Geometry, num_blocks: int) -> int | None:
    """Return how many tokens a request may have that has `num_blocks` blocks; None where it gives up what is behind the
    window of all layers, and needs no more.
    """
    num_tokens = num_blocks * geometry.block_tokens
    gives_up = config.window is not None and num_tokens >= 2 * config.window + geometry.block_tokens
    return None if gives_up else num_tokens


def max_model_len(spec: ServeSpec, context_length: int, pool_tokens: int | None) -> int:
    """Return how many tokens a request may have with its answer: the model's, the spec's and the pool's limit, if
    known.
    """
    limits = [context_length] if pool_tokens is None else [context_length, pool_tokens]
    if spec.max_model_len is not None:
        limits.append(spec.max_model_len)
    return min(limits)


def check_length(limit: int, num_prompt_tokens: int, max_tokens: int, *, param: str) -> None:
    """Raise ContextLengthExceeded, which names `param`, if prompt and answer together exceed `limit` tokens."""
    left = limit - num_prompt_tokens
    if left < min(max_tokens, 1):
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, but the prompt has {num_prompt_tokens}; "
            "shorten it, and leave room for the answer",
            param,
        )
    if max_tokens > left:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, but {num_prompt_tokens + max_tokens} were asked "
            f"for ({num_prompt_tokens} in the prompt, {max_tokens} to generate); shorten the prompt, or generate at "
            f"most {left}",
            param,
        )
