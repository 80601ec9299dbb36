"""Run cases on systems, one system at a time; consecutive cases with equal engines share a process."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from benchmarks.machine import load_average
from benchmarks.memory import watch_memory
from benchmarks.serving.cases import Case, EngineOptions
from benchmarks.serving.figures.results import OURS, Results
from benchmarks.serving.figures.rows import Row, latencies, median_row
from benchmarks.serving.replay import Record
from benchmarks.serving.systems.choice import open_session
from benchmarks.serving.systems.processes import Session, Setting
from benchmarks.serving.workload import TimedRequest, generate
from loray.spec import AdapterRef


def run(
    cases: Sequence[Case],
    systems: Sequence[str],
    setting: Setting,
    results: Results,
    *,
    slo_s: float,
    repeat: int | None = None,
    on_row: Callable[[Row], None],
) -> None:
    """Fill `results` row by row and call `on_row` with each. `repeat` replaces the cases' numbers of passes."""
    for options, group in itertools.groupby(cases, key=lambda case: case.engine):
        alike = list(group)
        for system in systems:
            todo = [case for case in alike if system == OURS or system in case.peers]
            if todo:
                for row, records in _run_group(todo, system, setting, options, results, slo_s, repeat):
                    results.rows[row.case, row.system] = row
                    results.records[row.case, row.system] = records
                    on_row(row)


def _run_group(
    cases: Sequence[Case],
    system: str,
    setting: Setting,
    options: EngineOptions,
    results: Results,
    slo_s: float,
    repeat: int | None,
) -> Iterator[tuple[Row, Sequence[Record]]]:
    refs = publish(setting, cases)
    before = load_average()
    with open_session(system, setting, options, refs) as session:
        for case in cases:
            yield _run_case(case, system, setting, session, refs, results, slo_s, repeat, before)
            before = load_average()


def publish(setting: Setting, cases: Iterable[Case]) -> list[AdapterRef]:
    """Publish the adapters that these cases request; returns their references."""
    found: list[AdapterRef] = []
    for case in cases:
        adapters, w = case.engine.adapters, case.workload
        if adapters is not None and w.first_adapter + w.num_adapters > len(found):
            found = setting.library.publish(adapters, w.first_adapter + w.num_adapters)
    return found


def _run_case(
    case: Case,
    system: str,
    setting: Setting,
    session: Session,
    refs: Sequence[AdapterRef],
    results: Results,
    slo_s: float,
    repeat: int | None,
    load_before: float,
) -> tuple[Row, Sequence[Record]]:
    w, vocab = case.workload, setting.base.config.vocab_size
    is_ours = system == OURS
    # Each case has other prompts, so that no prefix cache holds them. The cases "alone" and "batched" have equal
    # requests, in separate engines.
    label = case.name.removesuffix(" alone").removesuffix(" batched")
    with watch_memory(session.pid) as peak:
        for i in range(case.warm_up):
            requests = generate(w, vocab, pass_=-1 - i, label=label)
            session.run(requests if is_ours else requests[: w.at_once], w.at_once)
    passes = []
    records: Sequence[Record] = []
    requests = []
    for i in range((repeat or case.passes) if is_ours else 1):
        requests = generate(w, vocab, pass_=i, label=label)
        found, work = session.run(requests, w.at_once)
        records = records or found
        passes.append((latencies(found, slo_s), work))
        peak.sample()  # not during the pass: walking the page tables of a gigabyte blocks the process
    row = median_row(
        case.name, system, passes, peak_bytes=peak.nbytes, load_before=load_before, start_s=session.start_s
    )
    lora_bytes = _step_bytes(requests, refs, min(case.engine.max_num_seqs, w.at_once or math.inf))
    tokens = [(len(r.prompt_ids), r.max_tokens) for r in requests]
    at_once = None if w.at_once is None else min(w.at_once, case.engine.max_num_seqs)
    adapters = case.engine.adapters
    shared = adapters.shared_weights(setting.base.config) if adapters is not None and w.num_adapters else 0
    return row.with_floors(results.model.with_shared(shared), results.rates, tokens, at_once, lora_bytes), records


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
