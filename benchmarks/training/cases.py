"""The cases of the benchmark of training: each is one row of a table, some with a target."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

from benchmarks import workers
from benchmarks.training import steps
from benchmarks.training.peers import Trainer, Vera
from benchmarks.training.rows import Case, Row, Setting, Target
from benchmarks.training.workers.traffic import HEAD_DIM, NUM_HEADS, NUM_KV_HEADS
from loray.planning.compute import ATTENTION_BACKWARD, attention_pairs, count_flops
from loray.planning.run import shape_of
from loray.planning.sequence import HaloPlan, ring_elements, ulysses_elements
from loray.recipes.resolve import quarter

_BF16 = 2  # bytes


_EXACT = Target("≤", 0.0)


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one layer, forward and backward, with the base's heads and G = N/4."""

    tokens: int
    target: Target | None = None
    columns: ClassVar = (
        "dense s",
        "S2-Attn s",
        "dense/S2",
        "limit",
        "forward",
        "backward",
    )

    @property
    def name(self) -> str:
        return f"attention {_short(self.tokens)}"

    def run(self, setting: Setting) -> Row:
        model, group_size = setting.base.config, quarter(self.tokens)
        shape = (self.tokens, group_size, model.num_heads, model.num_kv_heads, model.head_dim, setting.repeats)
        command = ["benchmarks.training.workers.attention", *map(str, shape)]
        (found,) = workers.run([command], setting.num_threads)
        fastest = found["fastest"]
        s2, dense = _median(found["s2"]), _median(found["dense"][fastest])
        pairs = [attention_pairs(self.tokens, group, model.num_heads) for group in (None, group_size)]
        rest = {name: sum(times[0]) for name, times in found["dense"].items() if name != fastest}
        ratio, limit = sum(dense) / sum(s2), pairs[0] / pairs[1]
        cells = [f"{sum(dense):.2f}", f"{sum(s2):.2f}", f"{ratio:.2f}", f"{limit:.2f}"]
        cells += (f"{d:.2f}/{s:.2f}" for d, s in zip(dense, s2, strict=True))
        note = f"dense: {fastest}; " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in rest.items())
        return Row(tuple(cells), found | {"ratio": ratio, "limit": limit, "group_size": group_size}, ratio, note)


@dataclass(frozen=True, slots=True)
class Step:
    """A training step of LongLoRA with gradient checkpointing and G = N/4, the optimizer included. The other side
    differs only in its attention, which is the fastest dense one.
    """

    tokens: int
    target: Target | None = None
    columns: ClassVar = ("dense s", "S2-Attn s", "dense/S2", "by FLOPs", "peak GiB: dense", "S2-Attn")

    @property
    def name(self) -> str:
        return f"step {_short(self.tokens)}"

    def run(self, setting: Setting) -> Row:
        case = steps.Case(self.tokens, "longlora", checkpointing=True)
        s2, dense = (_measure(steps.Case(**asdict(case) | {"dense": x}), setting) for x in (False, True))
        flops = count_flops(shape_of(case.recipe, setting.base.config))
        more = (flops.dense_attention - flops.attention) * (1 + ATTENTION_BACKWARD + case.checkpointing)
        ratio, limit = dense.step_s / s2.step_s, 1 + more / flops.total
        cells = [f"{dense.step_s:.1f}", f"{s2.step_s:.1f}", f"{ratio:.2f}", f"{limit:.2f}"]
        cells += (f"{x.peak_bytes / 2**30:.2f}" for x in (dense, s2))
        return Row(tuple(cells), {"dense": asdict(dense), "s2": asdict(s2), "ratio": ratio, "by_flops": limit}, ratio)


@dataclass(frozen=True, slots=True)
class Memory:
    """The peak of the resident set in such a step with S2-Attn, above what the interpreter and its libraries hold."""

    tokens: int
    target: Target | None = None
    columns: ClassVar = ("peak GiB", "step s", "tokens/s")

    @property
    def name(self) -> str:
        return f"memory {_short(self.tokens)}"

    def run(self, setting: Setting) -> Row:
        found = _measure(steps.Case(self.tokens, "longlora", checkpointing=True), setting)
        peak = found.peak_bytes / 2**30
        cells = (f"{peak:.2f}", f"{found.step_s:.1f}", f"{self.tokens / found.step_s:.0f}")
        return Row(cells, asdict(found), peak)


@dataclass(frozen=True, slots=True)
class Activations:
    """The largest size of all tensors in a step, above their size between steps, beside that of P = 1. The step trains
    LoRA under S2-Attn over a sequence group of P ranks, with gradient checkpointing.
    """

    tokens: int
    sequence: int
    target: Target | None = None
    columns: ClassVar = ("activations MB", "of P = 1", "resident MB", "halo MB", "step s")

    @property
    def name(self) -> str:
        return f"sequence {_short(self.tokens)} P={self.sequence}"

    def run(self, setting: Setting) -> Row:
        case = steps.Case(self.tokens, "longlora", checkpointing=True, sequence=self.sequence, lean=True)
        found = _measure(case, setting)
        setting.activations[self.tokens, self.sequence] = found.activation_bytes
        alone = setting.activations.get((self.tokens, 1))
        share = None if alone is None else found.activation_bytes / alone
        cells = (
            f"{found.activation_bytes / 1e6:.0f}",
            "–" if share is None else f"{share:.2f}",
            f"{found.peak_bytes / 1e6:.0f}",
            f"{found.halo_bytes / 1e6:.2f}",
            f"{found.step_s:.1f}",
        )
        return Row(cells, asdict(found) | {"of_one": share}, float("nan") if share is None else share)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank of a sequence group sends in the forward pass of one layer with 8 query and 4 KV heads, counted
    at the collective, beside the formulas. The figures are those of the rank that sends most; `reached` is the largest
    relative difference from a formula.
    """

    tokens: int
    sequence: int
    group_size: int
    target: Target = _EXACT
    columns: ClassVar = (
        "G",
        "halo kB",
        "planned",
        "Ulysses kB",
        "formula",
        "ring kB",
        "formula",
        "Ulysses/halo",
    )

    @property
    def name(self) -> str:
        return f"traffic {_short(self.tokens)} P={self.sequence}"

    def run(self, setting: Setting) -> Row:
        numbers = [str(x) for x in (self.sequence, self.tokens, self.group_size)]
        with tempfile.TemporaryDirectory(prefix="traffic-") as folder:
            command = ["benchmarks.training.workers.traffic", f"{folder}/rendezvous"]
            ranks = [[*command, str(rank), *numbers] for rank in range(self.sequence)]
            found = workers.run(ranks, setting.num_threads)
        sent = {name: max(rank[name] for rank in found) for name in found[0]}
        expected = self.expected()
        cells = [str(self.group_size)]
        for name, planned in expected.items():
            cells += [f"{sent[name] / 1e3:.1f}", f"{planned / 1e3:.1f}"]
        cells.append(f"{sent['ulysses'] / sent['halo']:.1f}")
        off = max(abs(sent[name] / planned - 1) for name, planned in expected.items())
        return Row(tuple(cells), {"sent": sent, "expected": expected}, off)

    def expected(self) -> dict[str, int]:
        plan = HaloPlan(self.tokens, self.sequence, self.group_size, NUM_HEADS, NUM_KV_HEADS)
        shape = (self.tokens, self.sequence)
        return {
            "halo": max(plan.bytes_sent(rank, HEAD_DIM, "bfloat16") for rank in range(self.sequence)),
            "ulysses": ulysses_elements(*shape, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM) * _BF16,
            "ring": ring_elements(*shape, NUM_KV_HEADS, HEAD_DIM) * _BF16,
        }


def _traffic() -> Iterator[Traffic]:
    """G fixed, and G = N/4."""
    for tokens in (1024, 2048, 4096):
        for sequence in (2, 4):
            for group_size in dict.fromkeys((256, tokens // 4)):
                yield Traffic(tokens, sequence, group_size)


PRESETS: Mapping[str, tuple[Case, ...]] = {
    "default": (
        Attention(8192, Target("≥", 3.2)),
        Attention(16384, Target("≥", 4.0)),
        Step(16384, Target("≥", 2.5)),
        Memory(32768, Target("≤", 6)),
    ),
    "sequence": (
        Activations(8192, 1),
        Activations(8192, 2, Target("≤", 0.6)),
        Activations(8192, 4, Target("≤", 0.35)),
        *_traffic(),
    ),
    "vera": (Vera(512, 256, Target("≥", 1.3)),),
    "trainer": (
        Trainer("lora", 4, 512, Target("≥", 1.2)),
        Trainer("vera", 4, 512, Target("≥", 1.2)),
        Trainer("longlora", 1, 4096, Target("≥", 1.2)),
    ),
    "long": (Memory(100_000, Target("≤", 14)),),
}


def _measure(case: steps.Case, setting: Setting) -> steps.Measured:
    return steps.measure(case, setting.base, setting.num_steps, num_threads=setting.num_threads)


def _median(times: list[list[float]]) -> tuple[float, float]:
    """Medians of the forward and of the backward seconds."""
    forward, backward = zip(*times, strict=True)
    return statistics.median(forward), statistics.median(backward)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens // 1000}k"
