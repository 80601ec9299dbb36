"""What an engine on a GPU does before its first request, so that no request waits for it: kernels are compiled and
decode steps are recorded. The steps are the model's alone; the scheduler, its model of a step's time and the counters
never see them.
"""

from __future__ import annotations

import time

from loray.engine.model.decoder import Decoder
from loray.engine.pool.pool import Pool
from loray.engine.request import Request
from loray.engine.scheduling.plan import Chunk
from loray.spec import GenerateRequest, SamplingParams, ServeSpec
from loray.telemetry import get_logger
from loray_kernels import Recorded, RecordLimits

_log = get_logger(__name__)

_PROGRESS_S = 5.0  # between two lines of the log


def warm_up(model: Decoder, pool: Pool, spec: ServeSpec) -> Recorded | None:
    """How far recording has come; None where the backend records no steps. Done once: a further call changes nothing.

    `pool` is empty; the keys and values of its first blocks are written, which nobody reads. It runs in the thread that
    steps, since cuBLAS has a handle and workspaces for each thread.
    """
    if not model.records or model.recorded is not None:
        return model.recorded
    began = time.monotonic()
    for prompts in _prompts(pool, min(spec.max_num_batched_tokens, model.config.max_position_embeddings)):
        batch = model.batch(prompts, lambda chunk: None, pool)
        assert batch is not None
        model.forward(batch, pool)
    model.compile_adapters(pool)
    _log.info("steps with prompts are compiled, %.1f s", time.monotonic() - began)
    shown = time.monotonic()

    def show(progress: Recorded) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _PROGRESS_S:
            shown = time.monotonic()
            _log.info("recording decode steps: %s", _text(progress))

    recorded = model.record(RecordLimits(spec.graph_seconds, spec.graph_bytes), show)
    assert recorded is not None
    _log.info("recorded decode steps: %s", _text(recorded))
    if recorded.num_recorded < recorded.num_wanted:
        _log.warning(
            "%d kinds of decode steps are not recorded (graph_record_s %g, graph_bytes %d); they are padded to larger "
            "ones, or are computed launch by launch",
            recorded.num_wanted - recorded.num_recorded,
            spec.graph_seconds,
            spec.graph_bytes,
        )
    return recorded


def _text(r: Recorded) -> str:
    return f"{r.num_recorded} of {r.num_wanted}, {r.seconds:.1f} s, {r.num_bytes / 2**20:.0f} MiB"


def _prompts(pool: Pool, max_tokens: int) -> list[list[Chunk]]:
    """Steps of one prompt and of several: Triton compiles numbers that are 1 or multiples of 16 apart from others."""
    geometry = pool.geometry
    longest = min(max_tokens, geometry.num_blocks * geometry.block_tokens)
    steps = []
    for lengths in ((longest,), (longest // 4 * 2 + 1, longest // 4), (17, 2, 2)):
        step: list[Chunk] = []
        block = 0
        for i, length in enumerate(n for n in lengths if n > 1):
            request = Request(GenerateRequest(str(i), (0,) * length, SamplingParams(max_tokens=1)), i)
            num_blocks = geometry.blocks_for_tokens(length)
            request.blocks = list(range(block, block + num_blocks))
            block += num_blocks
            step.append(Chunk(request, 0, length))
        if step and block <= geometry.num_blocks:
            steps.append(step)
    return steps
