"""The figures of an engine that its replica reports and GET /status shows."""

from __future__ import annotations

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict


class Stretch(NamedTuple):
    """Neighbouring blocks of the pool, and what they hold, or most of them: free, kv, cached, layered, flat or run."""

    holds: str
    num_blocks: int


class EngineFigures(BaseModel):
    """The state at one moment, and totals since the engine started.

    num_loading         adapters on their way from the store
    blocks              blocks of the pool, by what they hold: free, kv, cached, layered, flat, run
    host_bytes          host memory that adapters take
    num_pool_hits       requests whose adapter was in the pool when they came; num_host_hits: on the host; num_misses:
                        neither
    num_loads           loads that have started; num_loaded_bytes: host memory of the complete ones
    num_evictions       adapters evicted from the pool; num_host_evictions: from host memory
    num_aborted         requests refused because their first token would have come too late
    """

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())

    num_running: int = 0
    num_waiting: int = 0
    num_loading: int = 0
    blocks: dict[str, int] = {}
    host_bytes: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_finished: int = 0
    num_preemptions: int = 0
    num_aborted: int = 0
    num_loads: int = 0
    num_failed_loads: int = 0
    num_evictions: int = 0
    num_host_evictions: int = 0
    num_pool_hits: int = 0
    num_host_hits: int = 0
    num_misses: int = 0
    num_loaded_bytes: int = 0
    max_adapters_in_step: int = 0

    @property
    def is_idle(self) -> bool:
        """There is no request."""
        return self.num_running + self.num_waiting == 0
