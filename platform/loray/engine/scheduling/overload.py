"""When a request would get its first token, estimated from the measured steps, and which requests are refused for it.

The model is that a step of n tokens lasts a + b·n seconds: a for reading the weights once, b for the work of one token.
Both are fitted to the measured steps; older steps weigh less. A throughput would not do: the tokens per second of one
decoding request do not predict those of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from loray.engine.request import Request
from loray.errors import Overloaded

_MEMORY_STEPS = 128  # after that many further steps, a step's weight in the fit has fallen to 1/e
_MEMORY_REQUESTS = 32
_MIN_RETRY_S = 1.0


class StepSeconds:
    """Least squares over (tokens, seconds) with exponentially falling weights."""

    def __init__(self) -> None:
        self._weight = self._n = self._t = self._nn = self._nt = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        keep = 1 - 1 / _MEMORY_STEPS
        self._weight = keep * self._weight + 1
        self._n = keep * self._n + num_tokens
        self._t = keep * self._t + seconds
        self._nn = keep * self._nn + num_tokens * num_tokens
        self._nt = keep * self._nt + num_tokens * seconds

    def predict(self, num_steps: float, num_tokens: float) -> float:
        """Seconds of that many steps with that many tokens in all. 0 before the first step was measured, so that no
        request is refused on a guess. While all steps had the same size, all of their time is counted as fixed.
        """
        if not self._weight:
            return 0.0
        n, t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - n * n
        slope = max(0.0, (self._nt / self._weight - n * t) / variance) if variance > 1e-6 * n * n else 0.0
        slope = min(slope, t / n)
        return num_steps * (t - slope * n) + num_tokens * slope


class FirstTokenEstimate:
    """Seconds until the first token of a request that waits behind others."""

    def __init__(self, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._max_num_seqs, self._budget = max_num_seqs, max_num_batched_tokens
        self._steps = StepSeconds()
        self.mean_output = 0.0  # tokens that a request generates, a running mean

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        self._steps.observe(num_tokens, seconds)

    def token_seconds(self) -> float:
        """Of one more token in a step; 0 while all steps had the same size."""
        return self._steps.predict(0, 1)

    def observe_end(self, num_output: int) -> None:
        """A running request has ended."""
        share = 1 / _MEMORY_REQUESTS if self.mean_output else 1.0
        self.mean_output += share * (num_output - self.mean_output)

    def seconds(self, num_tokens: float, *, num_running: int = 0, num_ahead: float = 0) -> float:
        """`num_tokens`: of the prompts ahead and its own. If the batch has no place for the request and the `num_ahead`
        ones before it, that many requests must end first; in a full batch one ends every mean_output ÷ max_num_seqs
        steps.
        """
        must_end = max(0.0, num_running + num_ahead + 1 - self._max_num_seqs)
        decode_steps = must_end * self.mean_output / self._max_num_seqs
        num_steps = max(1.0, num_tokens / self._budget, decode_steps)
        return self._steps.predict(num_steps, num_tokens + decode_steps * self._max_num_seqs)


class FirstTokenTargets:
    """Refuses requests whose first token would come too late. A request that has been admitted is never refused."""

    def __init__(
        self,
        *,
        ttft_slo_s: float | None,
        estimate: Callable[[Request], float],
        alone: Callable[[Request], float],
        clock: Callable[[], float],
    ) -> None:
        """
        ttft_slo_s  for requests without one of their own
        estimate    seconds to the first token of a request that joins the queue now
        alone       the same, of a request that is next
        """
        self._ttft_slo_s, self._estimate, self._alone, self._clock = ttft_slo_s, estimate, alone, clock
        self.num_aborted = 0

    def accept(self, request: Request) -> None:
        """Overloaded if its first token is expected later than its target."""
        slo = self._slo(request)
        if slo is None:
            return
        expected = self._estimate(request)
        if expected > slo:
            self.num_aborted += 1
            raise Overloaded(
                f"the first token is expected in {expected:.1f} s and was wanted within {slo:g} s",
                self.retry_after_s(request, expected),
            )
        request.start_by = self._clock() + slo - self._alone(request)

    def refuse_late(self, waiting: Iterable[Request]) -> list[tuple[Request, Exception]]:
        """The requests that would be too late even if they were next, each with its error."""
        now = self._clock()
        late = [r for r in waiting if r.start_by < now]
        if not late:
            return []
        self.num_aborted += len(late)
        expected = self._estimate(late[-1])  # one estimate for all: making it scans the queue
        return [
            (r, Overloaded(f"no first token within {self._slo(r):g} s", self.retry_after_s(r, expected))) for r in late
        ]

    def retry_after_s(self, request: Request, expected: float) -> float:
        """Seconds until the expected wait has fallen to the target of `request`."""
        return max(_MIN_RETRY_S, expected - (self._slo(request) or 0))

    def _slo(self, request: Request) -> float | None:
        return self._ttft_slo_s if request.spec.ttft_slo_s is None else request.spec.ttft_slo_s
