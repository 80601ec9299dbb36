"""The cases of the benchmark of training: each is one row of a table, some with a target."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from benchmarks.training import steps
from benchmarks.world import run_modules
from loray.bases.registry import BaseModel
from loray.planning.compute import ATTENTION_BACKWARD, attention_pairs, count_flops
from loray.planning.run import shape_of
from loray.recipes.resolve import quarter


@dataclass(slots=True)
class Setting:
    """`activations`: bytes that earlier rows measured, by (tokens, P)."""

    base: BaseModel
    num_threads: int
    repeats: int = 3
    num_steps: int = 1
    activations: dict[tuple[int, int], int] = field(default_factory=dict)


class Target(NamedTuple):
    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.sign} {self.value:g}"

    def is_met(self, reached: float) -> bool:
        return reached >= self.value if self.sign == "≥" else reached <= self.value


class Row(NamedTuple):
    """`cells` and `note` are printed, `figures` are written as JSON, and `reached` is compared with the target."""

    cells: tuple[str, ...]
    figures: Mapping[str, Any]
    reached: float
    note: str = ""


class Case(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def columns(self) -> tuple[str, ...]: ...

    @property
    def target(self) -> Target | None: ...

    def run(self, setting: Setting) -> Row: ...


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
        (found,) = run_modules([command], setting.num_threads)
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
        case = steps.RowStep(self.tokens, "longlora", checkpointing=True)
        s2, dense = (_measure(steps.RowStep(**asdict(case) | {"dense": x}), setting) for x in (False, True))
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
        found = _measure(steps.RowStep(self.tokens, "longlora", checkpointing=True), setting)
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
        case = steps.RowStep(self.tokens, "longlora", checkpointing=True, sequence=self.sequence, lean=True)
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
class Vera:
    """Training steps of VeRA on all linear modules, in turn with PEFT's VeRA in fp32, its default, and in bf16."""

    tokens: int
    rank: int
    target: Target | None = None
    columns: ClassVar = ("ours s", "PEFT s", "PEFT/ours", "PEFT bf16 s", "bf16/ours", "loss apart")

    @property
    def name(self) -> str:
        return f"VeRA r{self.rank}, {self.tokens}"

    def run(self, setting: Setting) -> Row:
        found = _found("vera", setting, self.tokens, self.rank, 3 * setting.repeats)
        ours, peft, bf16 = (statistics.median(found["seconds"][name]) for name in ("ours", "peft", "peft-bf16"))
        own, *others = found["losses"].values()
        apart = max(abs(a - b) for other in others for a, b in zip(own, other, strict=True))
        cells = (
            f"{ours:.3f}",
            f"{peft:.3f}",
            f"{peft / ours:.2f}",
            f"{bf16:.3f}",
            f"{bf16 / ours:.2f}",
            f"{apart:.3f}",
        )
        return Row(cells, found | {"ratio": peft / ours, "bf16_ratio": bf16 / ours, "apart": apart}, peft / ours)


@dataclass(frozen=True, slots=True)
class Trainer:
    """Training steps of a method by its recipe, in turn with those of PEFT's method in transformers' Trainer, in bf16.

    LongLoRA's peer has the same adapter, embeddings, norms and RoPE, and dense attention: PEFT has no other.
    """

    method: str
    rows: int
    tokens: int
    target: Target | None = None
    columns: ClassVar = ("ours s", "Trainer s", "Trainer/ours", "loss apart")

    @property
    def name(self) -> str:
        return f"{self.method} {self.rows} × {self.tokens}"

    def run(self, setting: Setting) -> Row:
        found = _found("trainer", setting, self.method, self.rows, self.tokens, 2 * setting.repeats)
        ours, theirs = (statistics.median(found["seconds"][name]) for name in ("ours", "trainer"))
        apart = max(abs(a - b) for a, b in zip(found["losses"]["ours"], found["losses"]["trainer"], strict=True))
        cells = f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.2f}", f"{apart:.3f}"
        return Row(cells, found | {"ratio": theirs / ours, "apart": apart}, theirs / ours)


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
    ),
    "vera": (Vera(512, 256, Target("≥", 1.3)),),
    "trainer": (
        Trainer("lora", 4, 512, Target("≥", 1.2)),
        Trainer("vera", 4, 512, Target("≥", 1.2)),
        Trainer("longlora", 1, 4096, Target("≥", 1.2)),
    ),
    "long": (Memory(100_000, Target("≤", 14)),),
}


def _measure(case: steps.RowStep, setting: Setting) -> steps.Measured:
    return steps.measure(case, setting.base, setting.num_steps, num_threads=setting.num_threads)


def _found(worker: str, setting: Setting, *arguments: object) -> dict[str, Any]:
    home = setting.base.path.parent.parent
    command = [f"benchmarks.training.workers.{worker}", str(home), setting.base.name, *map(str, arguments)]
    (found,) = run_modules([command], setting.num_threads)
    return found


def _median(times: list[list[float]]) -> tuple[float, float]:
    """Medians of the forward and of the backward seconds."""
    forward, backward = zip(*times, strict=True)
    return statistics.median(forward), statistics.median(backward)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else f"{tokens // 1000}k"
