"""How many bytes a pool has where the spec leaves it to the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loray.bases.config import ModelConfig
from loray.engine.memory.device import DeviceMemory, check_plan, plan_memory
from loray.engine.memory.limits import block_bytes
from loray.spec import ServeSpec, format_size
from loray.telemetry import get_logger
from loray_kernels import device_memory, scratch_bytes, workspace_bytes

_log = get_logger(__name__)


def sized(
    spec: ServeSpec, config: ModelConfig, device: torch.device, least: Callable[[int], int] = lambda num: num
) -> ServeSpec:
    """`spec` with the bytes of its pool. Called when the base is on `device`, of which `config` is this rank's part.

    Of several ranks all have as much as the one that has the least: `least` gives that of a number. On a GPU the log
    says what its memory is for. SpecError if the device has no room for two blocks.
    """
    if device.type != "cuda":
        return spec.model_copy(update={"pool_bytes": spec.fixed_pool_bytes})
    memory, ranks = DeviceMemory(*device_memory(device)), spec.tensor_parallel_size
    plan = plan_memory(spec, config, memory, held=workspace_bytes(), scratch=scratch_bytes())
    if spec.pool_bytes is not None:
        given = plan._replace(pool=spec.pool_bytes // ranks)
        _log.info("GPU memory: %s, which is given", given.text())
        if given.pool > plan.pool:
            left = format_size(max(plan.pool, 0))
            _log.warning("%s would be left for the pool; large steps may find no memory and fail a request", left)
        return spec
    check_plan(plan, spec, memory, least=2 * block_bytes(spec, config))
    pool = least(plan.pool)
    _log.info("GPU memory: %s", plan._replace(pool=pool).text())
    return spec.model_copy(update={"pool_bytes": pool * ranks})
