"""The measurements of `make gpu`, each with an engine of its own: python -m benchmarks.gpu.measure decode --json FILE

Figures are written after each case, and cases that the file has already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.serving import Shape, server
from benchmarks.world import MachineRates, rates_here
from loray_kernels import CaptureState

_WARM = 5  # steps of all rows before the first that counts
_STREAMS = 32  # beside which a cold adapter comes


class Figures:
    """Rows of a measurement by case, written after each, so that a phase that was stopped goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def add(self, case: str, row: dict[str, Any]) -> None:
        self.rows[case] = row
        if self._path is not None:
            made = self._path.with_suffix(".part")
            made.write_text(json.dumps({"rows": self.rows}, indent=2) + "\n", encoding="utf-8")
            made.replace(self._path)


Measure = Callable[[Shape, MachineRates, Figures, Path], None]


def decode(shape: Shape, rates: MachineRates, figures: Figures, folder: Path) -> None:
    """What recording took. Then milliseconds of a step, beside the floor, and of the host's part of it."""
    num_outputs = _WARM + shape.steps + 2 + 2 * max(shape.rows) * shape.context // shape.step_tokens
    fields = {"max_num_seqs": max(shape.rows), "max_model_len": shape.context + num_outputs + 16}
    with server(shape, folder, **fields) as s:
        figures.add("recording", _recording(s.recorded))
        for rows in shape.rows:
            for adapters in (n for n in shape.adapters if n <= max(rows, 1)):
                case = f"{rows} rows, {adapters} adapters"
                if case in figures.rows:
                    continue
                with s.decoding(rows, adapters, num_outputs):
                    for _ in range(_WARM):
                        s.step()
                    s.step_s.clear()
                    s.host_s.clear()
                    if any(len(s.step()) != rows for _ in range(shape.steps)):
                        raise SystemExit(f"a step of {case} did not give every row a token")
                    seconds, host_ms = list(s.step_s), round(1e3 * statistics.median(s.host_s), 3)
                floor = shape.decode_floor_s(rates, rows, shape.context + _WARM + shape.steps / 2, adapters)
                figures.add(case, _times(seconds, floor) | {"host_ms": host_ms})


def _recording(recorded: CaptureState | None) -> dict[str, float]:
    if recorded is None:
        return {}
    num, wanted, seconds, num_bytes = recorded
    return {"graphs": num, "wanted": wanted, "seconds": round(seconds, 1), "mbytes": round(num_bytes / 1e6, 1)}


def long(shape: Shape, rates: MachineRates, figures: Figures, folder: Path) -> None:
    """As `decode`, with long contexts: on the base, and on as many adapters as rows."""
    rows = shape.long_rows
    decode(replace(shape, rows=rows, adapters=(0, rows[-1]), context=shape.long_context), rates, figures, folder)


def prefill(shape: Shape, rates: MachineRates, figures: Figures, folder: Path) -> None:
    """Milliseconds to the first token of a prompt alone, on the base and on each rank."""
    longest = max(shape.prompts) + 16
    with server(shape, folder, max_num_seqs=4, max_model_len=longest, graph_record_s=0) as s:
        for num_tokens in shape.prompts:
            for adapter in (None, *range(len(shape.ranks))):
                case = f"{num_tokens} tokens, " + ("base" if adapter is None else f"rank {shape.ranks[adapter]}")
                if case in figures.rows:
                    continue
                seconds = [s.first_token_s(num_tokens, adapter) for _ in range(4)][1:]
                figures.add(case, _times(seconds, shape.prompt_floor_s(rates, num_tokens)))


def cold(shape: Shape, rates: MachineRates, figures: Figures, folder: Path) -> None:
    """The first token on an adapter that nobody has used, packed from the host's memory, beside streams of the base:
    beside a second request on it, and the longest step meanwhile beside the median one.
    """
    streams = min(_STREAMS, max(shape.rows))
    longest = shape.context + shape.stream_tokens + 16
    with server(shape, folder, max_num_seqs=2 * streams, max_model_len=longest) as s:
        for number, rank in enumerate(shape.ranks):
            if (case := f"rank {rank}") in figures.rows:
                continue
            cold_s, warm_s = [], []
            with s.decoding(streams, 0, shape.stream_tokens):
                s.step_s.clear()
                for turn in range(4):
                    adapter = number + len(shape.ranks) * turn
                    cold_s.append(s.first_token_s(shape.loop_prompt, adapter))
                    warm_s.append(s.first_token_s(shape.loop_prompt, adapter))
            figures.add(
                case,
                {
                    "ms": round(1e3 * statistics.median(cold_s), 2),
                    "warm_ms": round(1e3 * statistics.median(warm_s), 2),
                    "longest_step_ms": round(1e3 * max(s.step_s), 2),
                    "median_step_ms": round(1e3 * statistics.median(s.step_s), 2),
                    "mbytes": round(shape.adapter_bytes(rank) / 1e6, 1),
                },
            )


def crowded(shape: Shape, rates: MachineRates, figures: Figures, folder: Path) -> None:
    """As many adapters as the pool holds, then twice as many: the time to the first token should hardly change."""
    rank, at_once = shape.ranks[-1], 2 * shape.crowd
    tokens = at_once * (shape.loop_prompt + shape.loop_outputs + 32)
    pool = int(1.1 * shape.crowd * shape.adapter_bytes(rank)) + tokens * shape.token_bytes
    with server(shape, folder, pool_bytes=pool, max_num_seqs=at_once, max_model_len=128) as s:
        for adapters in (shape.crowd, 2 * shape.crowd):
            if (case := f"{adapters} adapters, pool for {shape.crowd}") in figures.rows:
                continue
            of = _of_rank(shape, adapters)
            s.loop(at_once, of, shape.loop_s / 6, shape.loop_prompt, shape.loop_outputs)
            figures.add(case, s.loop(at_once, of, shape.loop_s, shape.loop_prompt, shape.loop_outputs).row())


def many(shape: Shape, rates: MachineRates, figures: Figures, folder: Path) -> None:
    """Adapters drawn at random: first the base alone, then as many as stay in the pool, then more, most of which are in
    neither the pool nor the host's memory, beside those.
    """
    at_once = min(64, max(shape.rows))
    with server(shape, folder, max_num_seqs=at_once, max_model_len=128) as s:
        for adapters in (0, *shape.many):
            if (case := f"{adapters} adapters") in figures.rows:
                continue
            before, draw = s.engine.stats(), random.Random(adapters)

            def of(number: int, n: int = adapters, draw: random.Random = draw) -> int | None:
                return draw.randrange(n) if n else None

            row = s.loop(at_once, of, shape.loop_s, shape.loop_prompt, shape.loop_outputs).row()
            after = s.engine.stats()
            resident = figures.rows.get(f"{shape.many[0]} adapters", {}).get("tokens_per_s")
            if adapters > shape.many[0] and resident:
                row["of_resident"] = round(row["tokens_per_s"] / resident, 3)
            figures.add(
                case,
                row
                | {
                    "in_pool": after.num_pool_hits - before.num_pool_hits,
                    "on_host": after.num_host_hits - before.num_host_hits,
                    "loaded": after.num_misses - before.num_misses,
                },
            )


def _of_rank(shape: Shape, adapters: int) -> Callable[[int], int]:
    """Requests take `adapters` adapters of the last rank by turns."""
    return lambda number: len(shape.ranks) * (number % adapters) + len(shape.ranks) - 1


def _times(seconds: Sequence[float], floor_s: float) -> dict[str, float]:
    ms = 1e3 * statistics.median(seconds)
    return {
        "ms": round(ms, 3),
        "lowest_ms": round(1e3 * min(seconds), 3),
        "floor_ms": round(1e3 * floor_s, 3),
        "of_floor": round(1e3 * floor_s / ms, 3),
    }


MEASURES: Mapping[str, Measure] = {f.__name__: f for f in (decode, long, prefill, cold, crowded, many)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=MEASURES)
    parser.add_argument("--json", type=Path, help="write the figures there, and go on with those that are there")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")  # the log has how steps are recorded
    shape = Shape()
    rates = rates_here(shape.device)
    logging.info("%s reads %.0f GB/s, products %.0f TFLOP/s", shape.device, rates.bandwidth / 1e9, rates.flops / 1e12)
    with tempfile.TemporaryDirectory() as folder:
        MEASURES[args.phase](shape, rates, Figures(args.json), Path(folder))


if __name__ == "__main__":
    main()
