"""A bank's trainer computes for each operation what its model would alone, and one that fails harms no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.errors import ContextLengthExceeded, NotFoundError, RequestError, TrainingError
from loray.spec import LoraSpec
from loray.spec.datums import AdamParams, Datum, ForwardBackward, LossOutput, OptimStep, TokenLoss
from loray.train.many import trainer as trainer_module
from loray.train.many.trainer import BankTrainer
from tests.fixtures.bank import SPECS, alone, distance, make_bank, norm_in_fp64, plain

BaseFactory = Callable[..., BaseModel]
MODELS = ("one", "eight", "vera", "twin", "other")
LOSSES = {
    "one": TokenLoss(),
    "eight": TokenLoss(type="ppo"),
    "vera": TokenLoss(type="importance_sampling", ratio_cap=1.1, divisor=7.0),
    "twin": TokenLoss(type="gspo"),
    "other": TokenLoss(type="cispo", kl=0.5),
}


def datum(seed: int, length: int, prompt: int = 0) -> Datum:
    """Draw a sequence that begins with the first tokens of a prompt that all have in common."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, 256, length + 1)
    ids[:prompt] = np.random.default_rng(0).integers(0, 256, length + 1)[:prompt]
    return Datum(
        token_ids=ids[:-1],
        target_ids=ids[1:],
        weights=random.choice([0.0, 1.0, -0.5], length, p=[0.3, 0.4, 0.3]),
        logprobs=-random.uniform(4.0, 8.0, length),
        advantages=np.full(length, random.normal()),
    )


def operation(
    model: str, loss: TokenLoss, lengths: Sequence[int] = (3, 17, 8), prompt: int = 0, **fields: bool
) -> ForwardBackward:
    datums = tuple(datum(10 * i + len(model), n, prompt) for i, n in enumerate(lengths))
    return ForwardBackward(model, datums, loss, **fields)


def operations(lengths: Sequence[int] = (3, 17, 8), prompt: int = 0) -> list[ForwardBackward]:
    return [operation(model, loss, lengths, prompt) for model, loss in LOSSES.items()]


ANSWERS = (14, 30, 12, 14, 21, 26, 11, 13)  # lengths with a prompt of 11, which need two trees of 60 nodes


@pytest.fixture(scope="module")
def base(tiny_base: BaseFactory) -> BaseModel:
    return tiny_base("LlamaForCausalLM", std=0.05)


def make_trainer(base: BaseModel, models: Sequence[str] = MODELS, tokens_per_pass: int = 60) -> BankTrainer:
    return BankTrainer(make_bank(base, {name: SPECS[name] for name in models}), tokens_per_pass)


def computed(results: Sequence[object]) -> list[LossOutput]:
    assert all(isinstance(result, LossOutput) for result in results), results
    return results  # type: ignore[return-value]


def gradients(trainer: BankTrainer, model: str) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.bank.gradients(model).items()}


def plain_logprobs(model: torch.nn.Module, row: Datum) -> Tensor:
    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (row.token_ids, row.target_ids))
    logprobs_TV = torch.log_softmax(model(input_ids=ids[None]).logits[0], dim=1)
    return logprobs_TV.gather(1, targets[:, None])[:, 0]


def plain_loss(loss: TokenLoss, lp: Tensor, reference: Tensor, row: Datum) -> Tensor:
    """The formulas, one datum at a time."""
    w, lq, a = (torch.from_numpy(x.astype(np.float64)) for x in (row.weights, row.logprobs, row.advantages))
    ratio = torch.exp(lp - lq)
    if loss.type == "cross_entropy":
        losses = -lp
    elif loss.type == "ppo":
        losses = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    elif loss.type == "importance_sampling":
        losses = -torch.where(ratio > 1.1, 1.1 / ratio.detach(), 1.0) * ratio * a
    elif loss.type == "cispo":
        losses = -ratio.detach().clamp(0.0, 4.0) * a * lp
    else:
        counted = (w * a) != 0
        mean = (lp.detach() - lq)[counted].mean() if counted.any() else torch.tensor(0.0)
        s = torch.exp(mean + lp - lp.detach())
        losses = -torch.minimum(s * a, s.clamp(0.8, 1.2) * a)
    losses = losses + loss.kl * (torch.exp(reference - lp) - (reference - lp) - 1)
    return (losses * w).sum() / loss.divisor


@pytest.mark.parametrize("ops", [operations(), operations(ANSWERS, 11)], ids=["rows", "trees"])
def test_joined_passes_are_a_plain_loop_with_peft(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, ops: list[ForwardBackward]
) -> None:
    """In fp64: five models of different methods, ranks and losses; passes mix them, and cut operations apart."""
    norm_in_fp64(monkeypatch)
    trainer = make_trainer(base)
    outputs = computed(trainer.forward_backward(ops))
    untouched = plain(base, torch.float64)
    for op, output in zip(ops, outputs, strict=True):
        model, parameters = alone(base, trainer.bank, op.model, SPECS[op.model])
        total = torch.zeros((), dtype=torch.float64)
        for row, found in zip(op.datums, output.logprobs, strict=True):
            lp = plain_logprobs(model, row)
            with torch.no_grad():
                reference = plain_logprobs(untouched, row)
            np.testing.assert_allclose(found, lp.detach().numpy(), rtol=1e-10)
            total = total + plain_loss(op.loss, lp, reference, row)
        total.backward()
        assert output.loss == pytest.approx(total.item(), rel=1e-10)
        wanted = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        assert wanted.keys() == trainer.bank.gradients(op.model).keys()
        assert distance(trainer.bank.gradients(op.model), wanted.items()) < 1e-10


def test_each_operation_of_a_mixed_pass_is_as_alone(base: BaseModel) -> None:
    ops = operations()
    together = make_trainer(base)
    outputs = computed(together.forward_backward(ops))
    for op, output in zip(ops, outputs, strict=True):
        single = make_trainer(base, tokens_per_pass=10_000)
        (found,) = computed(single.forward_backward([op]))
        assert found.loss == pytest.approx(output.loss, rel=1e-12)
        assert found.metrics == pytest.approx(output.metrics, rel=1e-12)
        for ours, theirs in zip(found.logprobs, output.logprobs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)
        assert distance(single.bank.gradients(op.model), gradients(together, op.model).items()) < 1e-11


@pytest.mark.parametrize("forward_only", [False, True])
def test_what_datums_begin_with_in_common_is_computed_once(base: BaseModel, forward_only: bool) -> None:
    trainer = make_trainer(base, tokens_per_pass=256)
    seen = []
    trainer.bank.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    prompts = [operation(name, LOSSES[name], ANSWERS, 11, forward_only=forward_only) for name in ("one", "twin")]
    computed(trainer.forward_backward(prompts))
    num_nodes = 11 + sum(length - 11 for length in ANSWERS)
    assert seen == [(2, num_nodes)]  # for 2 · 141 tokens
    seen.clear()
    computed(trainer.forward_backward([operation("one", TokenLoss(), (12, 12), 1, forward_only=forward_only)]))
    assert seen == [(2, 12)]  # too little for a tree


@pytest.mark.parametrize("field", ["sliding_window", "attention_dropout"])
def test_a_base_of_other_attention_has_rows_alone(base: BaseModel, monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    trainer = make_trainer(base, tokens_per_pass=256)
    seen = []
    trainer.bank.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    monkeypatch.setattr(trainer.bank.model.config, field, 0.5, raising=False)
    computed(trainer.forward_backward([operation("one", TokenLoss(), (14, 14), 11, forward_only=True)]))
    assert seen == [(2, 14)]


def test_gradients_add_up_until_a_step_and_forwards_add_none(base: BaseModel) -> None:
    trainer = make_trainer(base)
    op = operation("one", TokenLoss())
    (forward,) = computed(trainer.forward_backward([operation("one", TokenLoss(), forward_only=True)]))
    assert all(not g.any() for g in trainer.bank.gradients("one").values())
    (first,) = computed(trainer.forward_backward([op]))
    assert first.loss == forward.loss
    once = gradients(trainer, "one")
    computed(trainer.forward_backward([op]))
    assert distance(gradients(trainer, "one"), ((n, 2 * g) for n, g in once.items())) < 1e-14
    before = {n: m.clone() for n, m in trainer.bank.masters("one").items()}
    (metrics,) = trainer.optim_step([OptimStep("one", AdamParams(learning_rate=0.1))])
    norm = math.sqrt(sum(float((2 * g).square().sum()) for g in once.values()))
    assert metrics == {"grad_norm": pytest.approx(norm), "num_updates": 1.0}
    assert all(not g.any() for g in trainer.bank.gradients("one").values())
    moved = [m - before[n] for n, m in trainer.bank.masters("one").items()]
    # Unclipped, Adam's first step is the learning rate for each element.
    assert torch.cat([d.abs().flatten() for d in moved]).median() == pytest.approx(0.1)


def test_a_step_clips_where_it_is_asked_to(base: BaseModel) -> None:
    trainer = make_trainer(base)
    names = ("one", "other")
    for _ in range(2):
        computed(trainer.forward_backward([operation(name, TokenLoss()) for name in names]))
        whole = AdamParams(learning_rate=0.01, eps=1e6)  # so that the step's size is the gradient's
        clipped = whole.model_copy(update={"grad_clip_norm": 1e-3})
        starts = {name: trainer.bank.state(name).masters for name in names}
        found = trainer.optim_step([OptimStep("one", whole), OptimStep("other", clipped)])
    steps = [
        math.sqrt(sum(float((m - starts[name][n]).square().sum()) for n, m in trainer.bank.masters(name).items()))
        for name in names
    ]
    assert isinstance(found[1], Mapping)
    assert found[1]["grad_norm"] > 1e-3
    assert steps[1] < steps[0] * 1e-2


@pytest.mark.parametrize("kind", ["target", "token", "long", "unknown"])
def test_data_that_cannot_be_computed_are_refused_alone(base: BaseModel, kind: str) -> None:
    trainer = make_trainer(base)
    good = operation("one", TokenLoss())
    bad = {
        "target": ForwardBackward("eight", (datum(1, 4), Datum([1], [320]))),
        "token": ForwardBackward("eight", (Datum([-1], [1]),)),
        "long": ForwardBackward("eight", (datum(1, 513),)),
        "unknown": ForwardBackward("nobody", (datum(1, 4),)),
    }[kind]
    refused, output = trainer.forward_backward([bad, good])
    error = {"long": ContextLengthExceeded, "unknown": NotFoundError}.get(kind, RequestError)
    assert type(refused) is error
    assert isinstance(output, LossOutput)
    assert not any(g.any() for g in trainer.bank.gradients("eight").values())
    if kind == "target":
        assert str(refused) == "datum 1 has the target 320; the base knows 0 to 319"


@pytest.mark.parametrize("accumulated", [False, True])
def test_a_loss_that_is_not_finite_is_its_operation_s_alone(base: BaseModel, accumulated: bool) -> None:
    trainer, other = make_trainer(base), make_trainer(base)
    first, bad, neighbour = (operation(name, TokenLoss()) for name in ("one", "one", "twin"))
    bad = ForwardBackward("one", (datum(3, 5), Datum([1, 2], [2, 3], weights=[1.0, math.inf])))
    if accumulated:
        computed(trainer.forward_backward([operation("one", TokenLoss(), (6,))]))
        computed(other.forward_backward([operation("one", TokenLoss(), (6,))]))
    results = trainer.forward_backward([first, bad, neighbour])
    wanted = computed(other.forward_backward([first, neighbour]))
    assert isinstance(results[1], TrainingError)
    assert "gradients are as they were" in str(results[1])
    for result, output in zip((results[0], results[2]), wanted, strict=True):
        assert isinstance(result, LossOutput)
        assert result.loss == pytest.approx(output.loss, rel=1e-12)
    for name in ("one", "twin"):
        assert distance(trainer.bank.gradients(name), gradients(other, name).items()) < 1e-12


def test_a_failure_in_a_joined_pass_is_found_by_computing_each_alone(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, other = make_trainer(base), make_trainer(base)
    token_losses = trainer_module.token_losses

    def failing(loss: TokenLoss, *arguments: object) -> object:
        if loss.type == "ppo":
            raise RuntimeError("out of memory")
        return token_losses(loss, *arguments)

    monkeypatch.setattr(trainer_module, "token_losses", failing)
    results = trainer.forward_backward(operations())
    monkeypatch.undo()
    assert [type(result) for result in results] == [LossOutput, TrainingError, LossOutput, LossOutput, LossOutput]
    assert "out of memory" in str(results[1])
    computed(other.forward_backward(operations()))
    for name in MODELS:
        if name == "eight":
            assert not any(g.any() for g in trainer.bank.gradients(name).values())
        else:
            assert distance(trainer.bank.gradients(name), gradients(other, name).items()) < 1e-11


def test_what_other_models_do_changes_no_bit(base: BaseModel) -> None:
    """With equal shapes, other rows, weights and learning rates of the neighbours leave a model's bits as they are."""

    def run(seed: int) -> tuple[LossOutput, dict[str, Tensor]]:
        bank = make_bank(base, {name: SPECS[name] for name in MODELS}, "float32")
        trainer = BankTrainer(bank, 200)
        for step in range(2):
            ops = [
                ForwardBackward(name, (datum(100 * step + (0 if name == "twin" else seed), 9),), LOSSES[name])
                for name in MODELS
            ]
            outputs = computed(trainer.forward_backward(ops))
            rates = {name: 1e-3 if name == "twin" else 1e-3 * seed for name in MODELS}
            trainer.optim_step([OptimStep(name, AdamParams(learning_rate=rates[name])) for name in MODELS])
        return outputs[MODELS.index("twin")], {n: m.clone() for n, m in bank.masters("twin").items()}

    (one, ours), (other, theirs) = run(1), run(7)
    assert one.loss == other.loss
    assert all(np.array_equal(a, b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_state_is_restored_with_gradients_that_no_step_has_used(base: BaseModel) -> None:
    trainer, again = make_trainer(base), make_trainer(base)
    ops = [operation(name, LOSSES[name]) for name in ("one", "vera")]
    steps = [OptimStep(name, AdamParams(learning_rate=1e-2)) for name in ("one", "vera")]
    computed(trainer.forward_backward(ops))
    trainer.optim_step(steps)
    computed(trainer.forward_backward(ops))
    for name in ("one", "vera"):
        state, unused = trainer.state(name)
        assert unused
        again.restore(name, state, unused)
    for one in (trainer, again):
        computed(one.forward_backward(ops[:1]))
        assert one.optim_step(steps)[1]["num_updates"] == 2.0
    for name in ("one", "vera"):
        ours, theirs = trainer.bank.masters(name), again.bank.masters(name)
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
        assert trainer.state(name)[1] == {}


def test_models_come_and_go(base: BaseModel) -> None:
    trainer = make_trainer(base, ("one",))
    trainer.create("new", LoraSpec(rank=4), seed=3)
    results = trainer.forward_backward([operation("new", TokenLoss()), operation("one", TokenLoss())])
    computed(results)
    trainer.remove("new")
    (gone,) = trainer.optim_step([OptimStep("new")])
    assert isinstance(gone, NotFoundError)
    trainer.create("new", LoraSpec(rank=4), seed=3)
    assert not any(g.any() for g in trainer.bank.gradients("new").values())
