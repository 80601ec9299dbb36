"""`build_engine`, which makes an engine from a base model: it loads the weights, allocates the pool, starts ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from loray.bases.registry import BaseModel
from loray.bases.weights import WeightSource
from loray.engine.engine import Engine
from loray.engine.model.decoder import Decoder
from loray.engine.parallel.driver import start_ranks
from loray.engine.parallel.worker import LocalWorkers, StartWorkers, num_threads
from loray.engine.pool.device_memory import sized
from loray.engine.pool.loader import LoadAdapter
from loray.engine.pool.pool import Pool, cut_pool
from loray.machine import Gpu, hardware, serving_dtype
from loray.spec import ServeSpec
from loray.telemetry import get_logger
from loray.text.grammar import GrammarCompiler
from loray_kernels import Weight, backend, use_device
from loray_kernels.memory import keep_freed
from loray_kernels.reference import ReferenceOps

_log = get_logger(__name__)


def build_engine(
    spec: ServeSpec,
    base: BaseModel,
    load: LoadAdapter,
    tensors: Iterable[tuple[str, Weight]] | None = None,
    start_workers: StartWorkers = LocalWorkers,
) -> Engine:
    """Load `base`, from `tensors` by name if they are given and else from its checkpoint, and allocate the
    pool. The thread that steps calls `Engine.warm_up` before.

    From now on the process keeps freed memory, see `keep_freed`. With several ranks it is rank 0, `start_workers`
    starts the others, and all read the checkpoint. Raises SpecError if the pool is too small or the ranks do not
    divide the base; EngineError if a rank does not start.
    """
    keep_freed()
    GrammarCompiler(base).warm()  # later it would hold up the steps of others
    spec = with_dtype(spec, torch.device(spec.device))
    if spec.tensor_parallel_size > 1:
        assert tensors is None, "every rank reads the checkpoint"
        spec = spec.model_copy(update={"num_threads": num_threads(spec)})
        ranks = start_ranks(spec, base, load, start_workers)
        return _ready(Engine(ranks.spec, base, *ranks[1:]), ranks.model)
    dtype, device = getattr(torch, spec.dtype), use_device(torch.device(spec.device))
    if spec.fixed_pool_bytes is not None:
        cut_pool(spec, base.config)  # what cannot be is told before the base is loaded
    tensors = WeightSource(base.path, base.config) if tensors is None else tensors
    model = Decoder(base.config, tensors, backend("auto", device), dtype=dtype, device=device)
    spec = sized(spec, base.config, device)
    layout, num_blocks = cut_pool(spec, base.config)
    pool = Pool(layout, num_blocks, dtype=dtype, device=device, page_writer=model.ops.page_writer)
    _log.info("pool of %d blocks, %d tokens, %d bytes", num_blocks, num_blocks * spec.block_tokens, pool.tensor.nbytes)
    return _ready(Engine(spec, base, model, pool, load), model)


def with_dtype(spec: ServeSpec, device: torch.device) -> ServeSpec:
    """Choose the dtype that a spec leaves to the device. The log says why, and how large its steps are."""
    _log.info("at most %d requests at once and %d tokens in a step", spec.max_num_seqs, spec.max_num_batched_tokens)
    if spec.dtype != "auto":
        return spec
    here, use_gpu = hardware(), device.type == "cuda"
    if use_gpu:
        gpu = Gpu(torch.cuda.get_device_name(device), 0, torch.cuda.get_device_capability(device))
        here = replace(here, gpus=(gpu,))
    has_kernels = use_gpu or type(backend("auto", device)) is not ReferenceOps  # which the others are made of
    dtype, why = serving_dtype(here, use_gpu=use_gpu, has_kernels=has_kernels)
    _log.info("serving in %s: %s", dtype, why)
    return spec.model_copy(update={"dtype": dtype})


def _ready(engine: Engine, model: Decoder) -> Engine:
    spec, pool = engine.spec, engine.pool
    try:
        max_blocks = pool.geometry.blocks_for_tokens(engine.max_model_len(None))
        model.use_captures(pool, num_slots=spec.max_num_seqs, max_blocks=max_blocks)
        if spec.speculation == "auto" and not model.can_capture and model.is_batch_invariant:
            engine.guess_tokens()
    except BaseException:
        engine.close()
        raise
    return engine
