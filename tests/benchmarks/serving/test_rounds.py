"""Which system runs when, and what is kept of its passes; the systems are fakes."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.machine import MachineRates
from benchmarks.serving.adapters import Library
from benchmarks.serving.cases import PRESETS, Case, EngineOptions
from benchmarks.serving.figures.floors import ModelSize
from benchmarks.serving.figures.results import Results
from benchmarks.serving.figures.rows import Row
from benchmarks.serving.replay import Record
from benchmarks.serving.run import run
from benchmarks.serving.systems.processes import PassResult, Setting
from benchmarks.serving.workload import TimedRequest, Workload


def test_cases_share_a_process_and_systems_take_turns(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []

    class Echo:
        pid, start_s, idle_cores = os.getpid(), 0.0, float("nan")
        num_calls = 0

        def cpu(self) -> Mapping[str, float]:
            self.num_calls += 1
            return {"engine": 0.01 * self.num_calls}

        def run(self, requests: Any, at_once: int | None) -> PassResult:
            return PassResult([Record(0.0, r.adapter, 1, [0.1, 0.2], [1, 2]) for r in requests], None)

    @contextmanager
    def fake(system: str, setting: Setting, options: EngineOptions, refs: Any) -> Iterator[Echo]:
        opened.append((system, len(refs)))
        yield Echo()

    monkeypatch.setattr("benchmarks.serving.run.open_session", fake)
    case = PRESETS["tiny"][0]
    cases = [case, replace(case, name="two", workload=replace(case.workload, num_adapters=2))]
    cases += [replace(case, name="base", engine=EngineOptions(), workload=Workload(2, at_once=1), peers=())]
    results = Results({}, MachineRates(1e9, 1e9), ModelSize.of(library.base.config))
    rows: list[Row] = []
    setting = Setting(library.base, library, folder)
    run(cases, ("loray", "peft"), setting, results, slo_s=1.0, on_row=rows.append)
    assert opened == [("loray", 3), ("peft", 3), ("loray", 0)]
    assert [(r.case, r.system) for r in rows] == [
        ("n=3", "loray"), ("two", "loray"), ("n=3", "peft"), ("two", "peft"), ("base", "loray")
    ]  # fmt: skip
    assert rows[0].cpu_ms == pytest.approx({"engine": 10 / 12})
    assert json.loads(json.dumps(results.to_dict(), allow_nan=False))["rows"][2]["system"] == "peft"


def test_every_second_round_runs_the_systems_in_the_opposite_order(
    library: Library, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    prompts: dict[str, list[tuple[int, ...]]] = defaultdict(list)

    class Echo:
        pid, start_s, idle_cores = None, 0.0, 0.5

        def __init__(self, system: str) -> None:
            self.system = system

        def cpu(self) -> Mapping[str, float]:
            return {}

        def run(self, requests: list[TimedRequest], at_once: int | None) -> PassResult:
            prompts[self.system] += [r.prompt_ids for r in requests]
            return PassResult([Record(0.0, None, 1, [float(len(opened))], [1]) for _ in requests], None)

    @contextmanager
    def fake(system: str, setting: Setting, options: EngineOptions, refs: Any) -> Iterator[Echo]:
        opened.append(system)
        yield Echo(system)

    monkeypatch.setattr("benchmarks.serving.run.open_session", fake)
    case = Case("base", EngineOptions(), Workload(2, at_once=1), passes=1, warm_up=1)
    whole = replace(case, name="whole", workload=replace(case.workload, streamed=False), in_process=False)
    results = Results({}, MachineRates(1e9, 1e9), ModelSize.of(library.base.config))
    rows: list[Row] = []
    setting = Setting(library.base, library, folder)
    systems = ("loray", "loray-serve", "vllm")
    run([case, whole], systems, setting, results, slo_s=1.0, rounds=2, on_row=rows.append)
    assert opened == [*systems, *reversed(systems)]
    assert len(results.rows) == len(rows) == 5
    assert ("whole", "loray") not in results.rows
    assert results.rows["base", "loray"].spread == (2 / 6, 2.0)  # both rounds count
    for sent in prompts.values():
        assert len(set(sent)) == len(sent)  # no round repeats a prompt
    assert set(prompts["loray-serve"]) > set(prompts["vllm"]) | set(prompts["loray"])
