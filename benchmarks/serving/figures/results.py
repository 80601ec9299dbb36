"""All rows of a run, with the machine's rates and the comparisons between rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.machine import MachineRates
from benchmarks.output import without_nan
from benchmarks.serving.figures.floors import ModelSize, decode_step_seconds, prompt_seconds
from benchmarks.serving.figures.mixed import MixedFigures
from benchmarks.serving.figures.rows import Row, differing
from benchmarks.serving.replay import UNKNOWN_ID, Record

OURS = "loray"  # the engine in process
BESIDE, SERVE, UP = "loray-beside", "loray-serve", "loray-up"
OUR_SYSTEMS = (OURS, BESIDE, SERVE, UP)
PEERS = ("peft", "peft-bf16", "vllm")


@dataclass(slots=True)
class Results:
    """`records`: those of each row's first pass. `mixed`: medians over the passes of a case with a long prompt.
    `transfer_s`: median seconds to read one adapter's bytes from the store.
    """

    machine: Mapping[str, str]
    rates: MachineRates
    model: ModelSize
    transfer_s: float = float("nan")
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    records: dict[tuple[str, str], Sequence[Record]] = field(default_factory=dict)
    mixed: dict[tuple[str, str], MixedFigures] = field(default_factory=dict)

    def get(self, case: str, system: str = OURS) -> Row | None:
        return self.rows.get((case, system))

    def step_floor(self, rows: int, lora_bytes: float = 0.0) -> float:
        return decode_step_seconds(self.model, self.rates, rows, lora_bytes)

    def prompt_floor(self, num_tokens: int) -> float:
        return prompt_seconds(self.model, self.rates, num_tokens)

    def isolation(self) -> list[tuple[str, str, float]]:
        """(label, system, share of requests with other tokens alone than in a batch)."""
        return [
            (label, system, differing(self.records[case, system], self.records[batched, system]))
            for case, system in self.records
            if case.endswith(" alone")
            for label in [case.removesuffix(" alone")]
            for batched in [f"{label} batched"]
            if (batched, system) in self.records
        ]

    def agreement(self) -> list[tuple[str, str, float]]:
        """(case, peer, share of requests with the same first token as loray's). A low share says that the peer computes
        other models.
        """
        return [
            (case, system, sum(a.ids[:1] == b.ids[:1] for a, b in zip(ours, theirs, strict=True)) / len(ours))
            for (case, system), theirs in self.records.items()
            if system != OURS
            and (ours := self.records.get((case, OURS)))
            and theirs[0].ids[:1] not in ([UNKNOWN_ID], [])
        ]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = without_nan(self._fields())
        return found

    def _fields(self) -> dict[str, Any]:
        return {
            "machine": dict(self.machine),
            "bandwidth": self.rates.bandwidth,
            "flops": self.rates.flops,
            "transfer_s": self.transfer_s,
            "rows": [asdict(row) for row in self.rows.values()],
            "mixed": [{"case": c, "system": s} | m._asdict() for (c, s), m in self.mixed.items()],
            "differing": [{"case": c, "system": s, "share": share} for c, s, share in self.isolation()],
            "first_tokens_as_ours": [{"case": c, "system": s, "share": share} for c, s, share in self.agreement()],
        }
