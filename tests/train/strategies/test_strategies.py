"""Every strategy on four ranks, 2 × 2 sequence × data and 1 × 4, does what one rank does; what recipes refuse."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.adapters.peft_format import WEIGHTS_FILE, read_config
from loray.bases.registry import BaseModel
from loray.errors import SpecError, UnsupportedError
from loray.spec import FIGURES, OBJECTIVES, ParallelSpec, TrainSpec
from loray.train import checkpoint
from loray.train import objectives as loss_module
from loray.train.checkpoint import FolderReporter
from loray.train.data.rows import Dataset
from loray.train.loop import train
from loray.train.mesh import Mesh, World
from loray.train.objectives import batch_loss
from loray.train.optimizer import OptimizerState
from loray.train.strategies import ddp, zero
from tests.fixtures.ranks import run_ranks
from tests.fixtures.training import METHODS, curve, make_data, paired, recipe, run

SIZE = 4
STRATEGIES = [
    "ddp",
    pytest.param("zero2", marks=pytest.mark.slow),
    pytest.param("zero3", marks=pytest.mark.slow),
    pytest.param("fsdp2", marks=pytest.mark.slow),
]
TRAINING: dict[str, Any] = {
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant", "max_grad_norm": 0.5, "loraplus_lr_ratio": 4},
    "batch": {"rows": 1, "accumulation": 2},
    "checkpoint": {"interval_steps": 1},
    "max_steps": 4,
    "num_workers": SIZE,
}
RUNS: dict[str, dict[str, Any]] = {
    "mesh": TRAINING | {"batch": {"rows": 1, "accumulation": 4, "order": "packed"}, "sequence": 2},
    "data": TRAINING | {"max_steps": 1, "num_workers": SIZE - 1},  # two ranks have a micro-batch less than the others
    "skips": TRAINING,
    "bf16": TRAINING | {"dtype": "bfloat16", "gradient_checkpointing": True, "max_steps": 1},
    "vera": TRAINING
    | {"adapter": METHODS["vera"]["adapter"] | {"dropout": 0.0}, "max_steps": 1, "sequence": 2}
    | {"attention": {"type": "dense"}}
    | {"optimizer": {"learning_rate": 1e-2, "max_grad_norm": None}},
    "dora": TRAINING | {"adapter": METHODS["dora"]["adapter"], "max_steps": 1},
}


def spec_of(name: str, strategy: str) -> TrainSpec:
    fields = METHODS["longlora"] | RUNS[name]
    sequence = fields.pop("sequence", 1)
    return recipe(**fields, parallel={"strategy": strategy, "sequence": sequence})


def on_one_rank(spec: TrainSpec) -> TrainSpec:
    """The same micro-batches, of whole rows."""
    num_workers = spec.num_workers // spec.parallel.sequence
    return spec.model_copy(update={"parallel": ParallelSpec(), "num_workers": num_workers})


class Case(NamedTuple):
    """What all runs share. bf16 has a base of its own, whose embeddings are tied."""

    bases: dict[str, BaseModel]
    data: Dataset
    folder: Path

    def run(self, name: str, spec: TrainSpec, *, label: str, resume_from: Path | None = None) -> FolderReporter:
        reporter = FolderReporter(self.folder / label, keep=9)
        base = self.bases.get(name, self.bases["any"])
        train(spec, base, self.data, reporter=reporter, workdir=self.folder, resume_from=resume_from)
        return reporter

    def saved(self, label: str, step: int) -> Path:
        return self.folder / label / f"step_{step:06d}"

    def optimizer(self, label: str, step: int) -> OptimizerState:
        return checkpoint.read_optimizer(self.saved(label, step))


# -- on the ranks -----------------------------------------------------------------------------------------------------


def _runs(rank: int, case: Case, strategy: str) -> None:
    assert World.current().gather(f"rank {rank}") == [f"rank {r}" for r in range(SIZE)]
    events = {}
    ddp.BUCKET_ELEMENTS = zero.BUCKET_ELEMENTS = 3000  # several, and the embedding larger than one
    for name in RUNS:
        # DeepSpeed's own number is for large models: all of a tiny one's parameters would stay gathered.
        zero._PERSISTENT_ELEMENTS = 0 if name != "vera" else 100_000
        if name == "skips":
            _poison({2: math.nan, 4: math.inf} if rank == 1 else {})
        events[name] = case.run(name, spec_of(name, strategy), label=f"{strategy}/{name}{_suffix(rank)}").events
        loss_module.batch_loss = batch_loss
    for name, source, num_steps in (("resumed", strategy, 4), ("moved", "alone", 3)):
        spec = spec_of("mesh", strategy).model_copy(update={"max_steps": num_steps})
        label, saved = f"{strategy}/{name}{_suffix(rank)}", case.saved(f"{source}/mesh", 2)
        events[name] = case.run("mesh", spec, label=label, resume_from=saved).events
    (case.folder / f"{strategy}-{rank}.json").write_text(json.dumps(events))


def _suffix(rank: int) -> str:
    return f"-{rank}" if rank else ""


def _poison(bad: dict[int, float]) -> None:
    """Add that to the loss of training micro-batches by their number; an infinite one leaves gradients as they were."""
    calls = iter(range(1 << 20))

    def poisoned(model: Any, batch: Any) -> Tensor:
        loss = batch_loss(model, batch)
        if not model.training or (value := bad.get(next(calls))) is None:
            return loss
        return loss * value if math.isnan(value) else loss + value

    loss_module.batch_loss = poisoned


# -- beside them ------------------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    case: Case
    strategy: str
    alone: dict[str, list[dict[str, Any]]]
    ranks: list[dict[str, list[dict[str, Any]]]]  # by rank, then by run

    def curve(self, name: str, event: str = "step", *, of: str = "ranks") -> list[tuple[float, ...]]:
        events = (self.alone if of == "alone" else self.ranks[0])[name]
        keys = ("step", "loss", "grad_norm", "skipped_steps") if event == "step" else ("step", "eval_loss")
        return [tuple(e[key] for key in keys) for e in events if e["event"] == event]


# -- what the ranks did -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("strategies")
    bases = {"any": tiny_base(std=0.05), "bf16": tiny_base(std=0.05, tie_word_embeddings=True)}
    return Case(bases, make_data(folder, spec_of("mesh", "ddp")), folder)


@pytest.fixture(scope="module")
def alone(case: Case) -> dict[str, list[dict[str, Any]]]:
    """The same recipes on one rank, which computes all micro-batches of a step itself."""
    events = {}
    for name in RUNS:
        if name == "skips":
            _poison({8 + 1: math.nan, 16 + 1: math.inf})  # rank 1's third and fifth micro-batches
        events[name] = case.run(name, on_one_rank(spec_of(name, "ddp")), label=f"alone/{name}").events
        loss_module.batch_loss = batch_loss
    return events


@pytest.fixture(scope="module", params=STRATEGIES)
def ran(request: pytest.FixtureRequest, case: Case, alone: dict[str, list[dict[str, Any]]]) -> Ran:
    strategy: str = request.param
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install 'loray[deepspeed]'")
    (case.folder / strategy).mkdir()
    run_ranks(_runs, SIZE, case.folder / strategy, case, strategy)
    ranks = [json.loads((case.folder / f"{strategy}-{r}.json").read_text()) for r in range(SIZE)]
    return Ran(case, strategy, alone, ranks)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rel: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == theirs[name].shape
        error = (tensor - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12)
        assert error < rel, f"{name}: {error}"


@pytest.mark.parametrize("name", ["mesh", "data", "vera", "dora"])
def test_losses_and_gradients_are_those_of_one_rank(ran: Ran, name: str) -> None:
    for event in ("step", "eval"):
        for ours, theirs in zip(ran.curve(name, event), ran.curve(name, event, of="alone"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    first, expected = (ran.case.optimizer(f"{source}/{name}", 1) for source in (ran.strategy, "alone"))
    assert first.num_updates == 1
    assert_close(first.exp_avg, expected.exp_avg, 1e-5)  # (1 − β₁) times the clipped gradient
    if name != "vera":
        assert all(norm > 0.5 for _, _, norm, _ in ran.curve(name))  # so that all were clipped


def test_ranks_agree_bit_for_bit(ran: Ran) -> None:
    own = ("tokens_per_s", "eta_s", "pid")
    told = [[{k: v for k, v in e.items() if k not in own} for run in rank.values() for e in run] for rank in ran.ranks]
    assert all(repr(events) == repr(told[0]) for events in told)
    assert not (ran.case.folder / ran.strategy / "mesh-1").exists()


def test_steps_that_are_not_finite_on_one_rank_are_skipped_on_all(ran: Ran) -> None:
    ours, theirs = ran.curve("skips"), ran.curve("skips", of="alone")
    assert [skipped for *_, skipped in ours] == [skipped for *_, skipped in theirs] == [0, 1, 2, 2]
    assert [math.isfinite(loss) for _, loss, *_ in ours] == [True, False, False, True]
    assert ours[3] == pytest.approx(theirs[3], rel=1e-5)
    state, before = ran.case.optimizer(f"{ran.strategy}/skips", 3), ran.case.optimizer(f"{ran.strategy}/skips", 1)
    assert state.num_updates == 1
    assert all(torch.equal(m, before.masters[name]) for name, m in state.masters.items())


def test_bf16_has_fp32_masters_and_the_same_forward_pass(ran: Ran) -> None:
    """Under gradient checkpointing, with tied embeddings."""
    (ours, *_), (theirs, *_) = ran.curve("bf16"), ran.curve("bf16", of="alone")
    assert ours[1] == pytest.approx(theirs[1], rel=1e-9)  # buffers like RoPE's frequencies are not cast
    assert ours[2] == pytest.approx(theirs[2], rel=1e-2)
    state, expected = (ran.case.optimizer(f"{source}/bf16", 1) for source in (ran.strategy, "alone"))
    assert {t.dtype for tensors in state[:3] for t in tensors.values()} == {torch.float32}
    assert_close(state.exp_avg, expected.exp_avg, 2e-2)
    assert any(bool((m != m.bfloat16()).any()) for m in state.masters.values())


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(ran: Ran) -> None:
    assert ran.curve("resumed") == ran.curve("mesh")[2:]
    ours, theirs = (ran.case.optimizer(f"{ran.strategy}/{name}", 4) for name in ("resumed", "mesh"))
    assert ours.num_updates == theirs.num_updates == 4
    for mine, unbroken in zip(ours[:3], theirs[:3], strict=True):
        assert all(torch.equal(tensor, unbroken[name]) for name, tensor in mine.items())


def test_a_checkpoint_moves_between_strategies_and_sizes(ran: Ran) -> None:
    (moved,) = ran.curve("moved")
    assert moved == pytest.approx(ran.curve("mesh", of="alone")[2], rel=1e-4)
    saved, spec = ran.case.saved(f"{ran.strategy}/mesh", 2), on_one_rank(spec_of("mesh", "ddp"))
    back = ran.case.run("mesh", spec, label=f"{ran.strategy}/back", resume_from=saved).events
    losses = [e["loss"] for e in back if e["event"] == "step"]
    assert losses == pytest.approx([loss for _, loss, *_ in ran.curve("mesh")[2:]], rel=1e-4)


def test_the_saved_adapter_is_whole_and_loads_in_peft(ran: Ran) -> None:
    folder, reference = (ran.case.saved(f"{of}/mesh", 4) / checkpoint.ADAPTER for of in (ran.strategy, "alone"))
    tensors, expected = (load_file(path / WEIGHTS_FILE) for path in (folder, reference))
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in expected.items()}
    assert read_config(folder)["trainable_token_indices"]  # embeddings are row deltas here
    ids = torch.arange(97, 137)[None]
    logits = []
    for path in (folder, reference):
        model = AutoModelForCausalLM.from_pretrained(ran.case.bases["any"].path, dtype=torch.float32)
        untrained = model(input_ids=ids).logits.detach()
        logits.append(PeftModel.from_pretrained(model, path).eval()(input_ids=ids).logits.detach())
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert (logits[0] - untrained).abs().max() > 0.05


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_what_a_strategy_needs_is_said(
    strategy: str, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("vera", strategy).model_copy(update={"parallel": ParallelSpec(strategy=strategy)})
    with pytest.raises(UnsupportedError, match=f"strategy {strategy} needs torch.distributed"):
        case.run("vera", spec, label="refused")
    if strategy != "fsdp2":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(World, "current", World)
        with pytest.raises(UnsupportedError, match=r"pip install 'loray\[deepspeed\]'"):
            case.run("vera", spec, label="refused")


def pairs_of(kind: str, strategy: str, num_workers: int = 2, *, sequence: int = 1) -> TrainSpec:
    """Of an objective, by LoRA, or of DPO by another method."""
    method, objective = ("lora", kind) if kind in OBJECTIVES else (kind, "dpo")
    return paired(
        method,
        {"type": objective},
        num_workers=num_workers,
        parallel={"strategy": strategy, "sequence": sequence},
        optimizer={"learning_rate": 1e-2, "schedule": "constant"},
        batch={"rows": 2, "accumulation": 4 * sequence // num_workers},
        checkpoint={"interval_steps": 1},
        max_steps=3,
    )


def evaluations(reporter: FolderReporter) -> list[list[float]]:
    names = ("eval_loss", *FIGURES)
    return [[e[name] for name in names if name in e] for e in reporter.events if e["event"] == "eval"]


def _run_pairs(rank: int, base: BaseModel, folder: Path, spec: TrainSpec) -> None:
    zero._PERSISTENT_ELEMENTS = 0  # so that ZeRO-3 shards a tiny model
    (folder / str(rank)).mkdir()
    _, reporter = run(spec, base, folder / str(rank))
    told = {"curve": curve(reporter), "eval": evaluations(reporter)}
    (folder / f"{rank}.json").write_text(json.dumps(told))


KINDS = ["dpo", "kto", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vera", "orpo", "simpo"))]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_do_what_one_does_with_pairs(kind: str, strategy: str, base: BaseModel, tmp_path: Path) -> None:
    compare_with_one(kind, pairs_of(kind, strategy), base, tmp_path)


@pytest.mark.parametrize("kind", [pytest.param("kto", marks=pytest.mark.slow), "orpo"])
def test_ranks_that_share_answers_do_what_one_does(kind: str, base: BaseModel, tmp_path: Path) -> None:
    compare_with_one(kind, pairs_of(kind, "ddp", sequence=2), base, tmp_path)


def compare_with_one(kind: str, spec: TrainSpec, base: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    _, alone = run(pairs_of(kind, "ddp", 1), base, tmp_path / "alone")
    run_ranks(_run_pairs, 2, tmp_path, base, tmp_path, spec)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for ours, theirs in zip(first["curve"], curve(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert first["eval"] == [pytest.approx(figures, rel=1e-4, abs=1e-5) for figures in evaluations(alone)]
    saved = checkpoint.read_optimizer(tmp_path / "0" / "run" / "step_000001")
    assert_close(saved.exp_avg, checkpoint.read_optimizer(alone.checkpoints[0].path).exp_avg, 1e-4)
    assert all(bool(torch.isfinite(t).all()) for t in saved.masters.values())


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("lora", {"batch": {"rows": 2, "order": "packed"}}, "batch.order packed joins rows"),
        ("lora", {"data": {"train": "x", "format": "chat"}}, "data.format chat is for objective.type sft"),
        (
            "lora",
            {"objective": {"type": "sft"}, "data": {"train": "x", "format": "preference"}},
            "is for objective.type dpo",
        ),
        ("lora", {"objective": {"label_smoothing": 0.1}}, "loss_type robust and label_smoothing"),
        ("lora", {"objective": {"loss_type": "robust"}}, "loss_type robust and label_smoothing"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(method: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        paired(method, **fields)
    assert message in str(error.value)


def test_sequence_groups_cover_the_workers() -> None:
    with pytest.raises(SpecError, match=r"parallel\.sequence is 3, which does not divide num_workers \(4\)"):
        recipe("longlora", num_workers=4, parallel={"sequence": 3})
    with pytest.raises(SpecError, match="1 workers do not split into sequence groups of 2"):
        Mesh.build(2, torch.device("cpu"))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_looks_for_gradients_that_are_not_finite_and_keeps_buffers(stage: int) -> None:
    spec = recipe(dtype="bfloat16", parallel={"strategy": f"zero{stage}"}, num_workers=2)
    assert zero._config(spec, stage)["bf16"] == {"enabled": True, "check_grad_overflow": True}
    module = torch.nn.Module()
    module.register_buffer("inv_freq", torch.ones(2))
    dtypes = {name: buffer.dtype for name, buffer in module.named_buffers()}
    zero._check_buffers(module, dtypes)
    with pytest.raises(UnsupportedError, match="changes the dtype of inv_freq: pip install --upgrade"):
        zero._check_buffers(module.bfloat16(), dtypes)


@pytest.mark.parametrize(
    ("method", "field", "message"),
    [
        ("vera", {"loraplus_lr_ratio": 16}, "LoRA's B, which vera does not train"),
        ("lora", {"vera_d_lr_ratio": 2}, "VeRA's d, which no other method trains"),
    ],
)
def test_rates_are_for_what_is_trained(method: str, field: dict[str, int], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        recipe(method, optimizer={"learning_rate": 1e-3} | field)


def test_a_rate_like_loras_is_doubted_for_vera() -> None:
    (doubt,) = recipe("vera", optimizer={"learning_rate": 4e-4}).warnings
    assert "learning_rate is 0.0004, as for LoRA" in doubt
    assert recipe("vera", optimizer={"learning_rate": 4e-3}).warnings == ()
    assert recipe("lora", optimizer={"learning_rate": 4e-4}).warnings == ()
