"""Run cases on systems, one system at a time; consecutive cases with equal engines share a process."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from benchmarks.client import Answer
from benchmarks.serving.cases import OUR_SYSTEMS, Case
from benchmarks.serving.rows import (
    EngineWork,
    Latencies,
    MixedFigures,
    Results,
    Row,
    latencies,
    median_row,
    mixed_figures,
)
from benchmarks.serving.sessions import PassResult, Session, Setting, open_session
from benchmarks.serving.workload import MixedLoad, TimedRequest, generate
from benchmarks.world import Steady, load_average, watch_memory
from loray.spec import AdapterRef

_MOST_PASSES = 1000  # of a case on a system: a repeated pass has prompts of its own, which no prefix cache holds


def run(
    cases: Sequence[Case],
    systems: Sequence[str],
    setting: Setting,
    results: Results,
    *,
    slo_s: float,
    repeat: int | None = None,
    rounds: int = 1,
    steady: Steady | None = None,
    on_row: Callable[[Row], None],
) -> None:
    """Fill `results` row by row and call `on_row` with each. `repeat` replaces the cases' numbers of passes.

    In each of the `rounds` every system starts anew and runs its passes, in every second round in the opposite order:
    so a machine that becomes slower or faster meanwhile does not favour the first or the last. With `steady` a pass
    counts only if the machine was as fast then as at the start.
    """
    for options, group in itertools.groupby(cases, key=lambda case: case.engine):
        alike = list(group)
        refs = publish(setting, alike)
        passes: dict[tuple[str, str], Passes] = {}
        for number in range(rounds):
            for system in systems[:: -1 if number % 2 else 1]:
                todo = [case for case in alike if case.runs_on(system)]
                if not todo:
                    continue
                before = load_average()
                with open_session(system, setting, options, refs) as session:
                    for case in todo:
                        found = passes.setdefault((case.name, system), Passes(case, system, before))
                        found.run(session, setting, slo_s, number, repeat, steady)
                        if number == rounds - 1:
                            found.add_to(results, setting, refs)
                            on_row(results.rows[case.name, system])
                        before = load_average()


class Passes:
    """What is measured of a case on a system, over all rounds."""

    def __init__(self, case: Case, system: str, load_before: float) -> None:
        self.case, self.system, self.load_before = case, system, load_before
        self.found: list[tuple[Latencies, EngineWork | None]] = []
        self.mixed: list[MixedFigures] = []
        self.answers: Sequence[Answer] = []
        self.requests: list[TimedRequest] = []
        self.peak_bytes, self.num_tokens, self.cpu_s, self.idle_cores = 0, 0, 0.0, float("nan")

    def run(
        self, session: Session, setting: Setting, slo_s: float, number: int, repeat: int | None, steady: Steady | None
    ) -> None:
        """The passes of one round. Each case has other prompts, so that no prefix cache holds them."""
        case, w, vocab = self.case, self.case.workload, setting.base.config.vocab_size
        is_ours = self.system in OUR_SYSTEMS
        with watch_memory(session.pid) as peak:
            for i in range(case.warm_up):
                requests = generate(w, vocab, pass_=-1 - i - number * case.warm_up, label=case.name)
                session.run(requests if is_ours else requests[: w.at_once], w.at_once)
        num_passes = (repeat or case.passes) if is_ours else case.peer_passes
        for i in range(num_passes):

            def one_pass(attempt: int, i: int = i) -> PassResult:
                pass_ = number * num_passes + i + _MOST_PASSES * attempt
                self.requests = generate(w, vocab, pass_=pass_, label=case.name)
                before = session.cpu()
                result = session.run(self.requests, w.at_once)
                self.cpu_s += max(0.0, session.cpu() - before)
                self.num_tokens += sum(len(answer.times) for answer in result.answers)
                self.answers = self.answers or result.answers  # of the prompts that all systems get first
                return result

            answers, work = one_pass(0) if steady is None else steady.run(one_pass)
            self.found.append((latencies(self.requests, answers, slo_s), work))
            if isinstance(w, MixedLoad) and (mixed := mixed_figures(self.requests, answers)) is not None:
                self.mixed.append(mixed)
            peak.sample()  # not during the pass: walking the page tables of a gigabyte blocks the process
        self.peak_bytes = max(self.peak_bytes, peak.nbytes)
        self.idle_cores = session.idle_cores

    def add_to(self, results: Results, setting: Setting, refs: Sequence[AdapterRef]) -> None:
        case, w, key = self.case, self.case.workload, (self.case.name, self.system)
        row = median_row(*key, self.found, self.peak_bytes, self.load_before)
        row = replace(row, cpu_ms=1e3 * self.cpu_s / max(1, self.num_tokens), idle_cores=self.idle_cores)
        most = case.engine.max_num_seqs
        lora_bytes = _step_bytes(self.requests, refs, min(most, w.at_once or math.inf))
        tokens = [(len(r.prompt_ids), r.max_tokens) for r in self.requests]
        at_once, adapters = None if w.at_once is None else min(w.at_once, most), case.engine.adapters
        shared = adapters.shared_weights(setting.base.config) if adapters is not None and w.num_adapters else 0
        model = results.model.with_shared(shared)
        results.rows[key] = row.with_floors(model, results.rates, tokens, at_once, lora_bytes)
        results.answers[key] = self.answers
        if self.mixed:
            results.mixed[key] = MixedFigures(*(statistics.median(v) for v in zip(*self.mixed, strict=True)))


def publish(setting: Setting, cases: Iterable[Case]) -> list[AdapterRef]:
    """Publish the adapters that these cases request; returns their references."""
    found: list[AdapterRef] = []
    for case in cases:
        adapters, w = case.engine.adapters, case.workload
        if adapters is not None and w.first_adapter + w.num_adapters > len(found):
            found = setting.library.publish(adapters, w.first_adapter + w.num_adapters)
    return found


def _step_bytes(requests: Sequence[TimedRequest], refs: Sequence[AdapterRef], rows: float) -> float:
    """Mean bytes of the distinct adapters of `rows` consecutive requests, which a full decode step reads."""
    size = int(min(rows, len(requests)))
    windows = [requests[i : i + size] for i in range(0, len(requests) - size + 1, size)]
    return statistics.fmean(
        sum(refs[a].nbytes for a in {r.adapter for r in window} if a is not None) for window in windows
    )
