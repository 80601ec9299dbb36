"""Run cases on systems, one system at a time; consecutive cases with equal engines share a process."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from benchmarks.machine import load_average
from benchmarks.memory import watch_memory
from benchmarks.serving.cases import Case
from benchmarks.serving.figures.mixed import MixedFigures, median_of, mixed_figures
from benchmarks.serving.figures.results import OUR_SYSTEMS, Results
from benchmarks.serving.figures.rows import EngineWork, Latencies, Row, latencies, median_row
from benchmarks.serving.replay import Record
from benchmarks.serving.systems.choice import open_session
from benchmarks.serving.systems.processes import PassResult, Session, Setting
from benchmarks.serving.workload import MixedLoad, TimedRequest, generate
from benchmarks.steady import Steady
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
                            _add(results, found, setting, refs)
                            on_row(results.rows[case.name, system])
                        before = load_average()


class Passes:
    """What is measured of a case on a system, over all rounds."""

    def __init__(self, case: Case, system: str, load_before: float) -> None:
        self.case, self.system, self.load_before = case, system, load_before
        self.found: list[tuple[Latencies, EngineWork | None]] = []
        self.mixed: list[MixedFigures] = []
        self.records: Sequence[Record] = []
        self.requests: list[TimedRequest] = []
        self.peak_bytes, self.start_s, self.idle_cores = 0, 0.0, float("nan")
        self.cpu_s: defaultdict[str, float] = defaultdict(float)
        self.num_tokens = 0

    def run(
        self, session: Session, setting: Setting, slo_s: float, number: int, repeat: int | None, steady: Steady | None
    ) -> None:
        """The passes of one round."""
        case, w, vocab = self.case, self.case.workload, setting.base.config.vocab_size
        is_ours = self.system in OUR_SYSTEMS
        # Each case has other prompts, so that no prefix cache holds them. The cases "alone" and "batched" have equal
        # requests, in separate engines.
        label = case.name.removesuffix(" alone").removesuffix(" batched")
        with watch_memory(session.pid) as peak:
            for i in range(case.warm_up):
                requests = generate(w, vocab, pass_=-1 - i - number * case.warm_up, label=label)
                session.run(requests if is_ours else requests[: w.at_once], w.at_once)
        num_passes = (repeat or case.passes) if is_ours else case.peer_passes
        for i in range(num_passes):

            def one_pass(attempt: int, i: int = i) -> PassResult:
                self.requests = generate(w, vocab, pass_=number * num_passes + i + _MOST_PASSES * attempt, label=label)
                before = session.cpu()
                result = session.run(self.requests, w.at_once)
                self._note_cpu(before, session.cpu(), result.records)
                self.records = self.records or result.records  # of the prompts that all systems get first
                return result

            found, work = one_pass(0) if steady is None else steady.run(one_pass)
            self.found.append((latencies(found, slo_s), work))
            if isinstance(w, MixedLoad) and (mixed := mixed_figures(self.requests, found)) is not None:
                self.mixed.append(mixed)
            peak.sample()  # not during the pass: walking the page tables of a gigabyte blocks the process
        self.peak_bytes = max(self.peak_bytes, peak.nbytes)
        self.start_s, self.idle_cores = session.start_s, session.idle_cores

    def _note_cpu(self, before: Mapping[str, float], after: Mapping[str, float], records: Sequence[Record]) -> None:
        for name, seconds in after.items():
            self.cpu_s[name] += max(0.0, seconds - before.get(name, 0.0))
        self.num_tokens += sum(len(record.ids) for record in records)


def _add(results: Results, passes: Passes, setting: Setting, refs: Sequence[AdapterRef]) -> None:
    case, w = passes.case, passes.case.workload
    row = median_row(
        case.name,
        passes.system,
        passes.found,
        peak_bytes=passes.peak_bytes,
        load_before=passes.load_before,
        start_s=passes.start_s,
    )
    cpu_ms = {name: 1e3 * seconds / max(1, passes.num_tokens) for name, seconds in passes.cpu_s.items()}
    row = replace(row, cpu_ms=cpu_ms, idle_cores=passes.idle_cores)
    lora_bytes = _step_bytes(passes.requests, refs, min(case.engine.max_num_seqs, w.at_once or math.inf))
    tokens = [(len(r.prompt_ids), r.max_tokens) for r in passes.requests]
    at_once = None if w.at_once is None else min(w.at_once, case.engine.max_num_seqs)
    adapters = case.engine.adapters
    shared = adapters.shared_weights(setting.base.config) if adapters is not None and w.num_adapters else 0
    model = results.model.with_shared(shared)
    key = case.name, passes.system
    results.rows[key] = row.with_floors(model, results.rates, tokens, at_once, lora_bytes)
    results.records[key] = passes.records
    if passes.mixed:
        results.mixed[key] = median_of(passes.mixed)


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


def measure_transfer(setting: Setting, cases: Sequence[Case]) -> float:
    """Median seconds to read one adapter of the case "cold adapter" from the store; NaN without that case."""
    found = [case for case in cases if case.name == "cold adapter"]
    seconds = []
    for ref in publish(setting, found)[4:]:
        began = time.perf_counter()
        setting.library.read(ref)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) if seconds else float("nan")
