"""What an engine counts of its steps and requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loray.engine.request import Request
from loray.engine.stats.histogram import Histogram
from loray.telemetry import METRICS


class Counters:
    """Totals since the start. A prompt token counts once: preempted or not, computed or found in the prefix cache."""

    def __init__(self) -> None:
        self.num_requests = self.num_finished = 0
        self.num_steps = self.num_prompt_tokens = self.num_output_tokens = 0
        self.max_adapters_in_step = 0
        self.step_seconds = Histogram(METRICS["engine_step_seconds"].buckets)
        self.step_tokens = Histogram(METRICS["engine_step_tokens"].buckets)
        self.step_adapters = Histogram(METRICS["engine_step_adapters"].buckets)
        self.queue_seconds: dict[str, Histogram] = {}
        self.first_step: Callable[[str, float], None] | None = None  # called with a traced request's id and the time

    def scheduled(self, requests: Iterable[Request], now: float) -> None:
        """Count the seconds that requests waited for their first step; those that ran before are left out."""
        for request in requests:
            if request.queued_at is not None:
                kind = "base" if request.adapter is None else request.adapter.method
                if kind not in self.queue_seconds:
                    self.queue_seconds[kind] = Histogram(METRICS["request_queue_time_seconds"].buckets)
                self.queue_seconds[kind].observe(now - request.queued_at)
                request.queued_at = None
                if self.first_step is not None and request.spec.traceparent is not None:
                    self.first_step(request.request_id, now)

    def computed(self, request: Request) -> None:
        """`num_computed` of the request has grown."""
        prompt = min(request.num_computed, request.num_prompt_tokens)
        self.num_prompt_tokens += max(0, prompt - request.num_prompt_counted)
        request.num_prompt_counted = max(prompt, request.num_prompt_counted)

    def stepped(self, num_tokens: int, num_adapters: int, seconds: float) -> None:
        self.num_steps += 1
        self.max_adapters_in_step = max(self.max_adapters_in_step, num_adapters)
        self.step_seconds.observe(seconds)
        self.step_tokens.observe(num_tokens)
        self.step_adapters.observe(num_adapters)
