"""A scheduler with a real allocator and residency, adapters whose loads a test ends, and no model: tokens need no
computation, and a step takes as long as `step_s`, `token_s`, `pair_s` and `scored_s` say.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from loray.engine.memory.adapter_manager import AdapterManager, Backoff
from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent, Geometry
from loray.engine.memory.partial import PartialLoad
from loray.engine.metrics import AdapterUsageLog
from loray.engine.request import Request, SchedulerOutput, StepWork
from loray.engine.scheduling.scheduler import Scheduler
from loray.engine.scheduling.waiting import WaitLimits
from loray.errors import IntegrityError
from loray.spec import AdapterRef, GenerateRequest, SamplingParams

BLOCK_TOKENS, SHARE = 4, 8


@dataclass(frozen=True)
class Packed:
    nbytes: int
    pair: None = None
    partial: PartialLoad | None = None

    @property
    def host_bytes(self) -> int:
        return self.nbytes


def adapter(name: str, num_blocks: int = 1) -> AdapterRef:
    return AdapterRef(
        digest=name.encode().hex().rjust(64, "0"),
        name=name,
        version=1,
        method="lora",
        base_fingerprint="0" * 64,
        context_length=1 << 20,
        nbytes=num_blocks,
    )


def no_backoff() -> Backoff:
    return Backoff(itertools.count(step=1 << 20).__next__)


class Simulation:
    """`ends`: the tokens that a request generates, if fewer than max_tokens. `loads_at_once`: loads take no time.
    `retries_at_once`: a failed load is tried again with the next request. `copy_steps`: for which an adapter's rows are
    on their way to the pool, asked for each copy.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 1 << 10,
        host_bytes: int = 1 << 30,
        loads_at_once: bool = True,
        retries_at_once: bool = False,
        copy_steps: Callable[[], int] = lambda: 0,
        step_s: float = 0.0,
        token_s: float = 0.0,
        pair_s: float = 0.0,
        scored_s: float = 0.0,
        **scheduler: Any,
    ) -> None:
        self.now = 0.0
        self.step_s, self.token_s, self.pair_s, self.scored_s = step_s, token_s, pair_s, scored_s
        self.allocator = BlockAllocator(Geometry(num_blocks, 1, BLOCK_TOKENS, SHARE))
        self.loads: dict[str, Future[Packed]] = {}
        self.sizes: dict[str, int] = {}  # in bytes, by digest
        self.damaged: set[str] = set()  # digests of adapters that cannot be placed
        self._loads_at_once, self._copy_steps = loads_at_once, copy_steps
        self.placed: list[str] = []  # names
        self._arrives_at: dict[Extent, int] = {}  # the number of the step, by the first extent
        self.num_steps = 0
        self.adapter_manager: AdapterManager[Packed, list[Extent]] = AdapterManager(
            host_bytes=host_bytes,
            load=self._load,
            place=self._place,
            remove=self.allocator.free_rows,
            copy_is_done=lambda extents: self.num_steps >= self._arrives_at.get(extents[0], 0),
            usage=AdapterUsageLog(now=lambda: self.now),
            clock=lambda: self.now,
            backoff=no_backoff() if retries_at_once else None,
        )
        options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64} | scheduler
        limits = {name: options.pop(name) for name in WaitLimits._fields if name in options}
        self.scheduler = Scheduler(
            allocator=self.allocator,
            adapter_manager=self.adapter_manager,
            adapter_blocks=lambda r: r.adapter.nbytes if r.adapter is not None else 0,
            clock=lambda: self.now,
            wait_limits=WaitLimits(**limits),
            **options,
        )
        self.max_num_seqs: int = options["max_num_seqs"]
        self.ends: dict[Request, int] = {}
        self.started: list[Request] = []  # in the order in which they were first admitted
        self.first_token_at: dict[Request, float] = {}
        self.outcomes: dict[Request, Exception | None] = {}
        self.served: Counter[str] = Counter()  # by tenant, in units of service
        self.most_output = 0  # that the running requests of one tenant could still generate
        self.most_prompt = 0  # tokens that the running requests of one tenant had still to compute, or of one step
        self.token_times: dict[Request, list[float]] = {}
        self._num_computed: Counter[Request] = Counter()  # of the prompt, at most so far
        self._num_requests = 0

    def add(
        self,
        num_prompt: int = 4,
        max_tokens: int = 4,
        adapter: AdapterRef | None = None,
        *,
        ends: int = 0,
        prompt_logprobs: int | None = None,
        **spec: Any,
    ) -> Request:
        n = self._num_requests = self._num_requests + 1
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        # Every prompt is another one, so that none is in the prefix cache.
        request = Request(
            GenerateRequest(str(n), tuple(range(n << 12, (n << 12) + num_prompt)), params, adapter, **spec), n
        )
        self.scheduler.add(request)
        self.ends[request] = ends or max_tokens
        return request

    def fill_up(self) -> None:
        """From now on admission leaves no room for what running requests generate, so that preemption is frequent."""
        self.scheduler._admission._lasts = lambda request, running: True  # type: ignore[method-assign]

    def remove(self, request: Request, error: Exception | None = None) -> None:
        assert request not in self.outcomes, "it has ended before"
        self.scheduler.remove(request)
        self.outcomes[request] = error

    @property
    def loading(self) -> list[str]:
        """Digests, in the order in which they were first requested."""
        return [digest for digest, load in self.loads.items() if not load.done()]

    def finish(self, digest: str, error: Exception | None = None) -> None:
        load = self.loads[digest]
        if error is None:
            load.set_result(Packed(self.sizes[digest]))
        else:
            load.set_exception(error)

    def step(self) -> SchedulerOutput:
        if self._loads_at_once:
            for digest in self.loading:
                self.finish(digest)
        plan = self.scheduler.next()
        output: Counter[str] = Counter()
        prompt: Counter[str] = Counter()
        for r in self.scheduler.running:
            output[r.tenant] += r.spec.params.max_tokens - len(r.output_ids)
            prompt[r.tenant] += max(0, r.num_prompt_tokens - self._num_computed[r])
        self.most_output = max([self.most_output, *output.values()])
        self.most_prompt = max([self.most_prompt, *prompt.values()])
        for request, error in plan.failed:
            self.remove(request, error)
        seconds = self.seconds(plan.work)
        self.now += seconds
        self.num_steps += 1
        if plan.chunks:
            self.scheduler.step_time.observe(plan.work, seconds)
        for request, start, num_tokens in plan.chunks:
            assert start == request.num_computed
            if request not in self.first_token_at and request not in self.started:
                self.started.append(request)
                self._num_computed[request] = start
            request.num_computed += num_tokens
            computed = min(request.num_computed, request.num_prompt_tokens)
            self.served[request.tenant] += max(0, computed - self._num_computed[request])
            self._num_computed[request] = max(computed, self._num_computed[request])
            if not request.num_pending:
                request.output_ids.append(1)
                self.served[request.tenant] += 2
                self.first_token_at.setdefault(request, self.now)
                self.token_times.setdefault(request, []).append(self.now)
                if len(request.output_ids) == self.ends[request]:
                    self.remove(request)
        self.check_integrity()
        return plan

    def seconds(self, work: StepWork) -> float:
        num_tokens = work.num_decoded + work.num_prompt
        return self.step_s + self.token_s * num_tokens + self.pair_s * work.num_pairs + self.scored_s * work.num_scored

    def run(self, until: Callable[[], bool] | None = None, *, max_steps: int = 100_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work or (until is not None and until()):
                return
            self.step()
        raise AssertionError("no end")

    def check_integrity(self) -> None:
        scheduler = self.scheduler
        kv = Counter(block for r in scheduler.running for block in r.blocks)
        kv.update(scheduler.prefix_cache.blocks())
        scheduler.prefix_cache.check_integrity()
        self.allocator.check_integrity(
            kv, [e for extents in self.adapter_manager.table.residents() for e in extents], {}
        )
        self.adapter_manager.table.check_integrity()
        scheduler.waiting.check_integrity()
        pins = Counter(r.adapter.digest for r in scheduler.running if r.adapter is not None)
        waiters = Counter(r.adapter.digest for r in scheduler.waiting if r.adapter is not None)
        assert pins == Counter(self.adapter_manager.table.pins())
        assert waiters == Counter(self.adapter_manager.table.waiters())
        assert len(scheduler.running) <= self.max_num_seqs

    def _place(self, ref: AdapterRef, packed: Packed) -> list[Extent] | None:
        if ref.digest in self.damaged:
            raise IntegrityError(f"{ref.name} is damaged")
        extents = self.allocator.allocate_rows(BlockKind.LAYERED, {SHARE: ref.nbytes})
        if extents is not None:
            self.placed.append(ref.name)
            self._arrives_at[extents[0]] = self.num_steps + self._copy_steps()
        return extents

    def _load(self, ref: AdapterRef) -> Future[Packed]:
        self.loads[ref.digest] = Future()
        self.sizes[ref.digest] = ref.nbytes
        return self.loads[ref.digest]
