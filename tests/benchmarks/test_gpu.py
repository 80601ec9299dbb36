"""`make gpu` without a GPU: what it says, how it goes on, and its measurements on a tiny model, with the CUDA kernels
compiled for the CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.__main__ import LIMIT_S, PHASES, Phase
from benchmarks.gpu.measure import MEASURES, Figures
from benchmarks.gpu.serving import Shape
from benchmarks.world import MachineRates
from loray_kernels import Parts
from loray_kernels.cuda import graphs
from tests.fixtures.shim_ops import use_shim_ops

TINY = Shape(
    base="tiny-random",
    device="cpu",
    ranks=(2, 5),
    rows=(1, 3),
    adapters=(0, 1, 3),
    prompts=(40,),
    many=(2, 5),
    crowd=2,
    context=12,
    steps=3,
    long_context=60,
    long_rows=(1, 2),
    stream_tokens=1000,
    loop_s=0.1,
    loop_prompt=4,
    loop_outputs=3,
    pool_bytes=4 << 20,
    host_bytes=8 << 20,
    step_tokens=64,
    graph_record_s=1e9,
)
CASES = {
    "decode": ["recording", "1 rows, 0 adapters", "1 rows, 1 adapters", *(f"3 rows, {n} adapters" for n in (0, 1, 3))],
    "long": ["recording", "1 rows, 0 adapters", "2 rows, 0 adapters", "2 rows, 2 adapters"],
    "prefill": ["40 tokens, base", "40 tokens, rank 2", "40 tokens, rank 5"],
    "cold": ["rank 2", "rank 5"],
    "crowded": ["2 adapters, pool for 2", "4 adapters, pool for 2"],
    "many": ["0 adapters", "2 adapters", "5 adapters"],
}


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "card_name", lambda: None)


@pytest.mark.parametrize("phase", CASES)
def test_every_measurement_runs_and_goes_on(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SIZES", (4,))
    monkeypatch.setattr(graphs, "KINDS", (Parts.NONE, Parts.LORA))
    use_shim_ops(monkeypatch)
    monkeypatch.setitem(sys.modules, "llguidance", None)  # a machine that is lent may lack it
    file = tmp_path / "figures.json"
    MEASURES[phase](TINY, MachineRates(1e9, 1e9), Figures(file), tmp_path)
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == CASES[phase]
    recorded = rows.pop("recording", {"graphs": 4})
    assert recorded["graphs"] >= 2
    for row in rows.values():
        assert row.get("ms", row.get("ttft_p50_ms")) > 0
        assert row.get("host_ms", 1) > 0
        assert row.get("floor_ms", 1) > 0
    if phase == "many":
        assert rows["5 adapters"]["loaded"] > 0
        assert rows["5 adapters"]["of_resident"] > 0
        assert "of_resident" not in rows["2 adapters"]
    first = next(case for case in CASES[phase] if case != "recording")
    known = Figures(file)
    known.rows = {case: {} for case in CASES[phase]}
    MEASURES[phase](TINY, MachineRates(1e9, 1e9), known, tmp_path)
    assert known.rows[first] == {}  # not measured again


def test_floors_are_bytes_over_bandwidth_or_products() -> None:
    llama, h100 = Shape(), MachineRates(3.35e12, 800e12)
    assert llama.token_bytes == 131_072
    assert llama.adapter_bytes(16) == 16 * 2 * 32 * (2 * 4096 + 2 * (4096 + 1024) + 2 * 4096)
    assert llama.decode_floor_s(h100, 1, 0, 0) == pytest.approx(4.5e-3, rel=0.1)  # 8 billion weights once, no embedding
    rows = 32 * 1000 * llama.token_bytes / h100.bandwidth
    assert llama.decode_floor_s(h100, 32, 1000, 0) - llama.decode_floor_s(h100, 32, 0, 0) == pytest.approx(rows)
    assert llama.prompt_floor_s(h100, 2048) == pytest.approx(2048 * 2 * 7e9 / 800e12, rel=0.1)


def test_without_a_card_it_says_so_and_what_it_would_run(
    no_card: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert command.main(["--dry-run", "--folder", str(folder)]) == 0
    listed = capsys.readouterr().out
    assert command.main(["--folder", str(folder)]) == 1
    assert capsys.readouterr().out == listed
    assert "torch finds no CUDA device here, so nothing can run" in listed
    for phase in PHASES:
        assert f"\n{phase.name} " in listed
        assert phase.about in listed
    assert not folder.exists()
    assert LIMIT_S <= 480


def test_phases_name_tests_and_modules_that_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    for phase in PHASES:
        for argument in phase.command:
            assert not argument.startswith("tests/") or (root / argument).exists()
    assert any("tests/train/test_gpu.py" in phase.command for phase in PHASES)
    assert {p.command[2] for p in PHASES if "benchmarks.gpu.measure" in p.command} == set(MEASURES) == set(CASES)


def test_it_goes_on_with_what_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = tmp_path / "good"
    write = "import json, sys; json.dump({'rows': {'a': {'ms': 1.5}}}, open(sys.argv[-1], 'w'))"
    phases = (
        Phase("figures", "", ("-c", write), (), measures=True),
        Phase("broken", "", ("-c", f"import os, sys; sys.exit(not os.path.exists({str(good)!r}))"), ()),
        Phase("other", "", ("-c", ""), ("a_module_that_is_missing",)),
    )
    monkeypatch.setattr(command, "PHASES", phases)
    monkeypatch.setattr(command, "card_name", lambda: "a card")
    assert sys.executable in phases[0].arguments(tmp_path)
    assert command.main(["--folder", str(tmp_path)]) == 1

    def outcomes() -> dict[str, Any]:
        return {n: p["outcome"] for n, p in json.loads((tmp_path / "results.json").read_text())["phases"].items()}

    assert outcomes() == {"figures": "done", "broken": "failed", "other": "skipped"}
    assert "no a_module_that_is_missing" in capsys.readouterr().out
    good.touch()
    monkeypatch.setattr(command, "PHASES", (phases[0]._replace(command=("-c", "raise SystemExit(1)")), phases[1]))
    command.main(["--folder", str(tmp_path)])
    assert outcomes()["figures"] == outcomes()["broken"] == "done"
    assert "| a | 1.5 |" in (tmp_path / "results.md").read_text()
    monkeypatch.setattr(command, "LIMIT_S", 0.1)
    monkeypatch.setattr(command, "_SHORTEST_S", 0.0)
    monkeypatch.setattr(command, "PHASES", (Phase("slow", "", ("-c", "import time; time.sleep(60)"), ()),))
    command.main(["--folder", str(tmp_path)])
    assert outcomes()["slow"] == "out of time"
    monkeypatch.setattr(command, "card_name", lambda: "another card")
    with pytest.raises(SystemExit, match=r"has results of a card at .*--folder"):
        command.main(["--folder", str(tmp_path)])
