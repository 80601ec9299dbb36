"""What an engine counts of its steps and requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from loray.engine.request import Request
from loray.engine.stats.histogram import Histogram
from loray.telemetry import METRICS


class Counters:
    """Totals since the start. Prompt tokens count once, preempted or not, and those found in the prefix cache too."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self._max_adapters = 0
        self._step_seconds = Histogram(METRICS["engine_step_seconds"].buckets)
        self._step_tokens = Histogram(METRICS["engine_step_tokens"].buckets)
        self._step_adapters = Histogram(METRICS["engine_step_adapters"].buckets)
        self._queue_seconds: dict[str, Histogram] = {}

    def scheduled(self, requests: Iterable[Request], now: float) -> None:
        """How long those waited that are computed for the first time."""
        for request in requests:
            if request.queued_at is not None:
                kind = "base" if request.adapter is None else request.adapter.method
                if kind not in self._queue_seconds:
                    self._queue_seconds[kind] = Histogram(METRICS["request_queue_time_seconds"].buckets)
                self._queue_seconds[kind].observe(now - request.queued_at)
                request.queued_at = None

    def computed(self, request: Request) -> None:
        """`num_computed` of the request has grown."""
        prompt = min(request.num_computed, request.num_prompt_tokens)
        self.totals["prompt_tokens"] += max(0, prompt - request.num_prompt_counted)
        request.num_prompt_counted = max(prompt, request.num_prompt_counted)

    def stepped(self, num_tokens: int, num_adapters: int, seconds: float) -> None:
        self.totals["steps"] += 1
        self._max_adapters = max(self._max_adapters, num_adapters)
        self._step_seconds.observe(seconds)
        self._step_tokens.observe(num_tokens)
        self._step_adapters.observe(num_adapters)

    def stats(self) -> dict[str, Any]:
        """Fields of EngineStats."""
        return {
            "num_steps": self.totals["steps"],
            "num_prompt_tokens": self.totals["prompt_tokens"],
            "num_output_tokens": self.totals["output_tokens"],
            "num_finished": self.totals["finished"],
            "max_adapters_in_step": self._max_adapters,
            "step_seconds": self._step_seconds.counts(),
            "step_tokens": self._step_tokens.counts(),
            "step_adapters": self._step_adapters.counts(),
            "queue_seconds": {kind: histogram.counts() for kind, histogram in self._queue_seconds.items()},
        }
