"""The benchmarks of serving run small, and their reports have their columns."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client import Endpoint, Received, Request
from benchmarks.report import Report, Verdict, main, quantile, renewed
from benchmarks.serving import batches, cold_start, conversations, host, invocations, publish, speculation
from benchmarks.serving.__main__ import main as serving
from benchmarks.serving.cases import PRESETS
from benchmarks.serving.targets import verdicts
from benchmarks.world import MachineRates, Speed, Steady
from loray.bases.registry import BaseModel

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def base(tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch) -> BaseModel:
    base = tiny_base()
    monkeypatch.setenv("LORAY_HOME", str(base.path.parents[1]))
    return base


@pytest.mark.slow
def test_the_engine_in_process_a_server_and_peft_run_the_same_requests(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To measure them takes seconds, as in other tests.
    monkeypatch.setattr("benchmarks.serving.__main__.measure_rates", lambda *_: MachineRates(1e10, 1e11))
    systems = ["--preset", "tiny", "--system", "loray", "--system", "loray-serve", "--peer", "peft", "--repeat", "1"]
    systems += ["--dtype", "float32"]
    file = tmp_path / "serving.json"
    folder = ["--folder", str(tmp_path / "bench"), "--model", base.name, "--threads", "1", "--json", str(file)]
    results = serving([*systems, *folder])
    report = Report.read(file)
    assert [(row[0], row[1]) for row in report.rows] == [("n=3", s) for s in ("loray", "loray-serve", "peft")]
    assert report.columns[2].startswith("tok/s")
    assert report.machine["commit"]
    for row, cells in zip(results.rows.values(), report.rows, strict=True):
        assert row.latencies.num_failed == 0 < row.latencies.throughput == cells[2]
        assert row.peak_bytes > 0
    ours = results.rows["n=3", "loray"]
    assert ours.work is not None
    assert ours.work.pool_hits == 1.0
    assert ours.step_ratio > 0
    assert verdicts(results) == []
    assert report.text().count("\n") == 3


def test_cases_are_well_formed_and_one_must_be_chosen() -> None:
    for cases in PRESETS.values():
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            w, adapters = case.workload, case.engine.adapters
            assert (adapters is not None and w.first_adapter + w.num_adapters <= adapters.num) or not w.num_adapters
            assert w.max_tokens <= case.engine.kv_tokens
    with pytest.raises(SystemExit, match="--only no-such is in no case's name; there are: "):
        serving(["--only", "no-such"])


@pytest.mark.slow
def test_publishes_of_a_trainer(tmp_path: Path) -> None:
    """On a cluster of its own, with SmolLM2 in fp32: figures for each row, and the trainer computes the same model."""
    report = publish.main(["--publishes", "2", "--seconds", "1", "--dtype", "float32", "--json", str(tmp_path / "j")])
    rows = {str(what): figures for what, *figures in report.rows}
    assert rows["published"][1] > rows["publish"][1] > 0
    assert rows["rollouts"][3] > 0 < rows["the engine alone"][3]
    assert rows["mismatch, largest"][3] <= 100  # millionths
    assert rows["rescored with other bits"][3] == 0


def test_cold_starts(base: BaseModel, tmp_path: Path) -> None:
    small = ["--ranks", "4", "--stores", "file", "--repetitions", "4", "--folder", str(tmp_path / "bench")]
    report = cold_start.main([*small, "--model", base.name])
    ((store, rank, *figures),) = report.rows
    assert (store, rank) == ("file", 4)
    assert len(figures) == len(report.columns) - 2
    assert all(isinstance(figure, float) and figure >= 0 for figure in figures)


def test_adapters_share_what_the_base_has_read(base: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "invocations.json"
    small = ["--adapters", "3", "--prompt", "160", "--rounds", "1", "--checked", "3", "--json", str(file)]
    report = invocations.main([*small, "--model", base.name])
    assert [(row[0], row[4]) for row in report.rows] == [(k, 10) for k in (1, 2, 3)]  # blocks of the base alone
    figures = json.loads(file.read_text())["more"]
    assert (figures["blocks"], figures["same_answers"]) == (10, 3)


def test_conversations_find_what_was_said(base: BaseModel) -> None:
    small = ["--users", "5", "--turns", "3", "--adapters", "2", "--think", "0", "--pool", "8000000"]
    report = conversations.main([*small, "--model", base.name])
    (on, off), names = report.rows, list(report.columns)
    assert (on[0], off[0], off[1]) == ("on", "off", 0)
    share = on[names.index("÷ without bound")]
    assert isinstance(share, float)
    assert 0.9 <= share <= 1


@pytest.mark.slow
def test_a_batch_beside_streams(base: BaseModel) -> None:
    small = ["--lines", "1000", "--adapters", "3", "--streams", "2", "--seconds", "2", "--rounds", "1"]
    report = batches.main([*small, "--model", base.name])
    assert [row[0] for row in report.rows] == ["none", "in progress"]
    assert all(isinstance(figure, int | float) and figure > 0 for row in report.rows for figure in row[1:6])
    assert float(report.more["alone_lines_per_s"]) > 0


def test_guesses_change_no_answer(base: BaseModel, tmp_path: Path) -> None:
    file = tmp_path / "speculation.json"
    small = ["--prompts", "2", "--tokens", "24", "--rounds", "1", "--json", str(file)]
    report = speculation.main([*small, "--model", base.name])
    assert [row[0] for row in report.rows] == [*speculation.TASKS]
    assert all(isinstance(figure, int | float) and figure > 0 for row in report.rows for figure in row[1:5])
    assert json.loads(file.read_text())["columns"] == list(report.columns)


@pytest.mark.parametrize("adapters", [0, 3])
def test_a_step_of_the_host_is_a_copy_a_replay_the_sampler_and_a_copy_back(adapters: int) -> None:
    small = ["--layers", "2", "--heads", "4", "--kv-heads", "2", "--rows", "3", "--steps", "3", "--context", "20"]
    report = host.main([*small, "--adapters", str(adapters)])
    row: dict[str, Any] = dict(zip(report.columns, report.rows[0], strict=True))
    assert (row["rows"], row["adapters"], row["launches"], row["torch's operations"]) == (3, adapters, 2, 2)
    assert row["kernels in the graph"] >= 2 * 9  # of two layers
    assert row["host, ms\t.3f"] > 0


def test_a_client_counts_tokens_and_refuses_what_is_no_whole_answer() -> None:
    def event(text: str, finish: str | None = None) -> bytes:
        data = f"data: {json.dumps({'choices': [{'text': text, 'finish_reason': finish}]})}\n\n".encode()
        return b"%x\r\n%b\r\n" % (len(data), data)

    whole = HEAD + event("a") + event("b c", "length") + b"0\r\n\r\n"
    sent = {"bad": b"HTTP/1.1 429 No\r\nretry-after: 9\r\nretry-after-ms: 500\r\ncontent-length: 0\r\n\r\n"}
    sent |= {"good": whole, "cut": whole[:-20], "ended": HEAD + event("a") + b"0\r\n\r\n"}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (await reader.readuntil(b"}")).decode()
        writer.write(next(data for name, data in sent.items() if f'"{name}"' in asked))
        await writer.drain()
        writer.close()

    async def run() -> dict[str, tuple[int, int, str]]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            endpoint = Endpoint(server.sockets[0].getsockname()[1], key="k")
            _, answers = await endpoint.send([Request(0.0, name, [1], 3) for name in sent])
            assert answers[0].retry_after_s == 0.5
            return {name: (a.status, len(a.times), a.error) for name, a in zip(sent, answers, strict=True)}

    found = asyncio.run(run())
    assert found.pop("good") == (200, 3, "")
    assert found.pop("bad")[0] == 429
    assert all(error for _, _, error in found.values())
    for size in (1, 7, len(whole)):
        parts = [(float(i), whole[i : i + size]) for i in range(0, len(whole), size)]
        assert [e["choices"][0]["text"] for _, e in Received(parts).events()] == ["a", "b c"]


def test_a_pass_is_repeated_while_the_machine_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    speeds = iter([Speed(1.0, 1.0)] * 10 + [Speed(0.5, 1.0)] + [Speed(1.0, 1.0)] * 9)
    steady = Steady(1, patience_s=60.0, measure=lambda: next(speeds))
    assert steady.run(lambda attempt: attempt) == 1
    assert (steady.num_repeated, steady.num_unsteady) == (1, 0)
    assert "1 passes were repeated" in steady.describe()


def test_tables_of_pages_are_those_of_their_figures(tmp_path: Path) -> None:
    Report({}, ["a", "b\t.1f"], [["x", 1.25], ["y", None]]).write(tmp_path / "t.json")
    page = "# A\n\n<!-- table t -->\nold\n<!-- end -->\nrest\n"
    new = "# A\n\n<!-- table t -->\n\n| a | b |\n|---|---|\n| x | 1.2 |\n| y | |\n\n<!-- end -->\nrest\n"
    assert renewed(page, tmp_path) == new == renewed(new, tmp_path)
    assert main(["--check"]) == 0
    assert quantile([3.0, 1.0, 2.0], 0.75) == 2.5
    assert not Verdict("failed", "≥", 1.0, float("nan")).is_met
