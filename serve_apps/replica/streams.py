"""Streams of a request's deltas: with max_tokens fitted to the pool, and merged if the reader is slower."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from loray.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from loray.engine.stream import EngineStream
    from loray.spec import GenerateRequest, TokenDelta


async def fitted(stream: EngineStream, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
    """As `generate`, with max_tokens lowered to the engine's limit for this adapter.

    Until an adapter has been loaded, the engine estimates its size in the pool. A request that turns out to be too long
    is submitted once more, with the limit that is known by then.
    """
    estimated = _fit(stream, request)
    started = False
    try:
        async with aclosing(stream.generate(estimated)) as deltas:
            async for delta in deltas:
                started = True
                yield delta
        return
    except ContextLengthExceeded:
        exact = _fit(stream, request)
        if started or exact.params.max_tokens >= estimated.params.max_tokens:
            raise
    async with aclosing(stream.generate(exact)) as deltas:
        async for delta in deltas:
            yield delta


def _fit(stream: EngineStream, request: GenerateRequest) -> GenerateRequest:
    """Lowers max_tokens to the limit, but not below 1. If even 1 is too much, the engine refuses the request."""
    left = max(stream.max_model_len(request.adapter) - len(request.prompt_ids), 1)
    if request.params.max_tokens <= left:
        return request
    return replace(request, params=request.params.model_copy(update={"max_tokens": left}))


async def coalesced(deltas: AsyncGenerator[TokenDelta, None]) -> AsyncGenerator[TokenDelta, None]:
    """The same stream in fewer deltas if the reader is slower than the engine."""
    ready: list[TokenDelta] = []
    changed = asyncio.Event()

    async def pump() -> None:
        try:
            async with aclosing(deltas) as stream:
                async for delta in stream:
                    ready.append(delta)
                    changed.set()
        finally:
            changed.set()

    task = asyncio.create_task(pump())
    try:
        while not task.done() or ready:
            await changed.wait()
            changed.clear()
            if ready:
                batch, ready[:] = ready[:], []
                yield merge_deltas(batch)
        await task
    finally:
        task.cancel()
        await asyncio.wait([task])


def merge_deltas(deltas: list[TokenDelta]) -> TokenDelta:
    """Merges consecutive deltas of one request into one."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    logprobs = None if last.logprobs is None else tuple(lp for d in deltas for lp in d.logprobs or ())
    return last._replace(
        token_ids=tuple(t for d in deltas for t in d.token_ids),
        logprobs=logprobs,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )
