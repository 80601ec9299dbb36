"""Results as a Markdown table and as an SVG picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import panels
from examples.quality.setting import Run, best_of
from loray.spec import format_size

_COLUMNS = (
    "task",
    "method",
    "in",
    "rate",
    "seeds",
    "held-out loss",
    "score",
    "trained",
    "file",
    "step s",
    "peak GiB",
)


@dataclass
class Result:
    """One method on one task in one system.

    runs     trainings with all rates and seeds; empty for the base
    final    the runs with the best rate, one for each seed
    scores   of the answers of each final run, from 0 to 100
    """

    task: str
    metric: str
    method: str
    system: str
    runs: tuple[Run, ...]
    peak_bytes: int = 0
    scores: tuple[float, ...] = ()

    @property
    def final(self) -> tuple[Run, ...]:
        if not self.runs:
            return ()
        best = best_of(self.runs).rate
        return tuple(r for r in self.runs if r.rate == best)

    @property
    def step_s(self) -> float:
        """Median seconds over all runs, without the first step of each, which warms up."""
        return statistics.median(s for run in self.runs for s in run.seconds[1:])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    lines += (" | ".join(_cells(r)) for r in results)
    return "\n".join(f"| {line} |" for line in lines)


def _cells(result: Result) -> tuple[str, ...]:
    score = f"{_spread(result.scores, 1)} {result.metric}"
    if not result.runs:
        return (result.task, result.method, "–", "–", "–", "–", score, "0", "–", "–", "–")
    final = result.final
    return (
        result.task,
        result.method,
        result.system,
        f"{final[0].rate:.1e}",
        str(len(final)),
        _spread([r.held_out for r in final], 3),
        score,
        f"{final[0].num_parameters:,}",
        format_size(final[0].nbytes),
        f"{result.step_s:.2f}",
        f"{result.peak_bytes / 2**30:.2f}",
    )


def _spread(values: Sequence[float], digits: int) -> str:
    """The mean, ± the largest distance of a seed from it."""
    mean = statistics.mean(values)
    text = f"{mean:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {max(abs(v - mean) for v in values):.{digits}f}"


def plot(results: Sequence[Result], path: Path) -> None:
    """Write an SVG. For each task: scores over trained parameters, a mark for each seed; below them, loss over rate."""
    tasks = list(dict.fromkeys(r.task for r in results))
    methods = list(dict.fromkeys(r.method for r in results if r.runs))
    colours = {method: f"C{i}" for i, method in enumerate(methods)}
    with panels(path, 2, len(tasks), size=(4.2 * len(tasks), 6.4)) as axes:
        for column, task in enumerate(tasks):
            _draw(axes[0][column], axes[1][column], [r for r in results if r.task == task], colours)
        axes[0][0].legend(fontsize="x-small")


def _draw(scores: Any, rates: Any, results: Sequence[Result], colours: Mapping[str, str]) -> None:
    for result in results:
        if not result.runs:
            scores.axhline(result.scores[0], color="grey", linestyle="--", label="base")
            continue
        is_ours = result.system == "loray"
        marks: dict[str, Any] = {
            "color": colours[result.method],
            "marker": "o" if is_ours else "x",
            "label": f"{result.method}, {result.system}",
        }
        scores.plot([r.num_parameters for r in result.final], result.scores, linestyle="none", **marks)
        by_rate: dict[float, list[float]] = {}
        for run in result.runs:
            by_rate.setdefault(run.rate, []).append(run.held_out)
        means = [(rate, statistics.mean(losses)) for rate, losses in sorted(by_rate.items())]
        rates.plot(*zip(*means, strict=True), linestyle="-" if is_ours else "none", **marks)
    scores.set(title=results[0].task, xscale="log", xlabel="trained parameters", ylabel=results[0].metric)
    rates.set(xscale="log", xlabel="learning rate", ylabel="held-out loss")
