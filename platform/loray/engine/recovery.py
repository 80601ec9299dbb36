"""A step that needs more memory than the device has fails its largest request; the others go on."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch

from loray.engine.model.decoder import Decoder
from loray.engine.request import Request
from loray.engine.scheduling.plan import Chunk
from loray.engine.scheduling.scheduler import Scheduler
from loray.errors import EngineError
from loray.telemetry import get_logger
from loray_kernels.memory import is_out_of_memory

_log = get_logger(__name__)


def undo_step(
    error: RuntimeError, chunks: Sequence[Chunk], scheduler: Scheduler[Any, Any], model: Decoder
) -> tuple[Request, EngineError]:
    """As if the step of `chunks`, which `error` ended before a request got a token, had not been. Returns the request
    with the most tokens in it, which the caller ends, and the error that it gets. Raises `error` if it has another
    reason than memory, or if there are no chunks, so that no request could be ended for it.
    """
    if not is_out_of_memory(error) or not chunks:
        raise error
    traceback.clear_frames(error.__traceback__)  # their tensors are freed
    torch.cuda.empty_cache()
    model.forget_steps()
    for chunk in chunks:
        chunk.request.num_computed, chunk.request.history = chunk.start, None
    largest = max(chunks, key=lambda chunk: (chunk.num_tokens, chunk.request.num_tokens))
    for request in (chunk.request for chunk in chunks if chunk is not largest):
        # A prompt that this step would have ended is served by turns again; others go on where they were.
        if request.num_pending > 1 and request not in scheduler.waiting.begun:
            scheduler.preempt(request)
    total = sum(chunk.num_tokens for chunk in chunks)
    _log.warning("a step of %d tokens needed more memory than the device has: %s", total, error)
    reason = (
        f"the step needed more memory than the device has; this request had the most of its {total} tokens, "
        f"{largest.num_tokens}. Send it again, or lower max_num_batched_tokens, pool_bytes or graph_bytes of the spec"
    )
    return largest.request, EngineError(reason)
