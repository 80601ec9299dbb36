"""Random lives of requests in a small pool: they come, wait for loads and copies, are cancelled, fail and end."""

from __future__ import annotations

import random

from loray.engine.request import Request
from loray.engine.scheduling.fairness import MAX_OVERTAKES
from loray.errors import ContextLengthExceeded, IntegrityError, Overloaded
from tests.engine.scheduling.simulation import BLOCK_TOKENS, Simulation, adapter


class Life:
    """All events in random order, in a pool that barely holds the largest request. `most_copy_steps`: for which the
    rows of an adapter are on their way to the pool; each copy takes a random number of steps up to it.
    """

    def __init__(self, seed: int, *, most_copy_steps: int = 0) -> None:
        self.rng = rng = random.Random(seed)
        self.refs = [adapter(f"a{i}", 1 + i % 3) for i in range(8)]
        self.failing = set(rng.sample([r.digest for r in self.refs], 2))
        self.num_blocks = rng.randint(7, 12)
        self.sim = Simulation(
            num_blocks=self.num_blocks,
            host_bytes=rng.choice([1, 4, 100]),
            loads_at_once=False,
            retries_at_once=True,
            copy_steps=lambda: rng.randint(0, most_copy_steps) if most_copy_steps else 0,
            places_ahead=most_copy_steps > 0 and rng.random() < 0.5,
            max_num_seqs=rng.randint(1, 5),
            max_num_batched_tokens=rng.randint(5, 20),
            enable_prefix_caching=rng.random() < 0.5,
            step_s=0.1,
            token_s=0.01,
        )
        if rng.random() < 0.5:
            self.sim.fill_up()
        self.cancelled: set[Request] = set()
        self.all: list[Request] = []

    def add(self) -> None:
        rng = self.rng
        max_tokens = rng.randint(1, 14)
        slo = rng.choice([None, None, None, 3.0])
        try:
            request = self.sim.add(
                rng.randint(1, 12),
                max_tokens,
                rng.choice([None, *self.refs]),
                ends=rng.randint(1, max_tokens),
                tenant=rng.choice(["", "t", "u"]),
                priority=rng.choice([0, 0, 0, 1, -1]),
                ttft_slo_s=slo,
            )
        except Overloaded:
            assert slo is not None
        else:
            self.all.append(request)

    def finish(self) -> None:
        digest = self.rng.choice(self.sim.loading)
        fails = digest in self.failing and self.rng.random() < 0.5
        self.sim.finish(digest, IntegrityError("damaged") if fails else None)

    def cancel(self) -> None:
        live = [r for r in self.all if r not in self.sim.outcomes]
        if live:
            request = self.rng.choice(live)
            self.cancelled.add(request)
            self.sim.remove(request)

    def live(self, num_requests: int) -> None:
        while len(self.all) < num_requests:
            match self.rng.random():
                case p if p < 0.3:
                    self.add()
                case p if p < 0.5 and self.sim.loading:
                    self.finish()
                case p if p < 0.53:
                    self.cancel()
                case _:
                    self.sim.step()

    def end(self) -> None:
        """Without further requests, all end in a number of steps that is bounded by what there is to compute."""
        for _ in range(60 * (1 + sum(r not in self.sim.outcomes for r in self.all))):
            if not self.sim.scheduler.has_work:
                return
            while self.sim.loading:
                self.finish()
            self.sim.step()
        raise AssertionError("somebody starves")

    def check(self) -> None:
        sim = self.sim
        assert set(sim.outcomes) == set(self.all)
        for request, error in sim.outcomes.items():
            if request in self.cancelled:
                continue
            if error is None:
                assert len(request.output_ids) == sim.ends[request]
            elif isinstance(error, IntegrityError):
                assert request.adapter is not None
                assert request.adapter.digest in self.failing
            elif isinstance(error, Overloaded):
                assert request.spec.ttft_slo_s is not None
                assert request not in sim.started
            else:
                assert isinstance(error, ContextLengthExceeded)
                own = 0 if request.adapter is None else request.adapter.nbytes
                assert own + -(-request.max_tokens // BLOCK_TOKENS) > self.num_blocks
            assert request.num_overtaken <= MAX_OVERTAKES
        assert not sim.adapter_manager.table.pins()
        assert not sim.adapter_manager.table.waiters()
        while sim.adapter_manager.evict_one():
            pass
        sim.scheduler.prefix_cache.evict(self.num_blocks)
        assert sim.allocator.num_free == self.num_blocks
