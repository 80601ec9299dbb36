"""Traces of production, from the files as their owners publish them.

Azure LLM inference, 2023: TIMESTAMP,ContextTokens,GeneratedTokens. P. Patel et al.: Splitwise, ISCA 2024
Mooncake: lines of {"timestamp": ms, "input_length": …, "output_length": …}. R. Qin et al., FAST 2025
Lines of the same with "adapter": its number, and "probe": true where its times are not reported, of a run of
`python -m benchmarks.cluster`
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from loray.errors import DataError
from loray.simulation.workload.requests import Requests

WHERE = {
    "azure": "AzureLLMInferenceTrace_code.csv or …_conv.csv of https://github.com/Azure/AzurePublicDataset",
    "mooncake": "conversation_trace.jsonl or …_trace.jsonl of https://github.com/kvcache-ai/Mooncake",
}
_PATTERNS = {"azure": "*[Aa]zure*.csv", "mooncake": "*mooncake*.jsonl"}


def find(name: str, folder: Path | None) -> Path:
    """The file of a known trace in `folder`, the first by name. DataError says where to get it."""
    found = sorted(folder.glob(_PATTERNS[name])) if folder is not None else []
    if not found:
        looked = f"{folder} has no {_PATTERNS[name]}" if folder is not None else "LORAY_TRACES names no folder"
        raise DataError(
            f"no trace of {name}: {looked}. Download {WHERE[name]}, and name it with --trace {name}:FILE, or its "
            f"folder with LORAY_TRACES"
        )
    return found[0]


def read(path: Path) -> Requests:
    """A trace by its file's name: .csv is Azure's format, .jsonl Mooncake's."""
    try:
        with path.open(newline="") as lines:
            rows = list(_azure(lines) if path.suffix == ".csv" else _mooncake(lines))
    except (KeyError, ValueError, TypeError) as e:
        raise DataError(
            f"{path} is not a trace: {type(e).__name__}: {e}. Expected are Azure's columns TIMESTAMP,ContextTokens,"
            f"GeneratedTokens (.csv) or Mooncake's timestamp, input_length, output_length in JSON lines (.jsonl)"
        ) from e
    if not rows:
        raise DataError(f"{path} has no requests")
    rows.sort()
    at, *numbers, probe = (np.array(column) for column in zip(*rows, strict=True))
    prompt, output, adapter = (column.astype(np.int64) for column in numbers)
    return Requests(at - at[0], prompt, output, adapter, probe)


def _azure(lines: Iterable[str]) -> Iterator[tuple[float, int, int, int, bool]]:
    for row in csv.DictReader(lines):
        at = (
            datetime.fromisoformat(row["TIMESTAMP"][:26]).replace(tzinfo=UTC).timestamp()
        )  # seven digits of a second; Python reads six
        yield at, int(row["ContextTokens"]), int(row["GeneratedTokens"]), 0, False


def _mooncake(lines: Iterable[str]) -> Iterator[tuple[float, int, int, int, bool]]:
    for line in filter(str.strip, lines):
        row = json.loads(line)
        adapter = int(row.get("adapter", 0))
        if adapter < 0:
            raise ValueError(f"adapter {adapter} is negative")
        probe = bool(row.get("probe", False))
        yield row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), adapter, probe
