"""A bank of adapters computes for each what it is alone: gradients, initial weights, files; and isolates all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loray.adapters.peft_format import files_in_memory, read_adapter
from loray.bases.registry import BaseModel
from loray.errors import ConflictError, NotFoundError, SpecError, UnsupportedError
from loray.methods.attach import attach
from loray.spec import AdapterSpec, AloraSpec, LongLoraSpec, LoraSpec, OptimizerSpec, VeraSpec
from loray.spec.methods import Ia3Spec, MissSpec, RoadSpec
from loray.train.checkpoint import adapter_files, save_adapter
from loray.train.many.bank import AdapterBank
from loray.train.many.optimizer import Update, update
from tests.fixtures.bank import ROWS, SPECS, alone, distance, losses, make_bank, move, own_rows, plain, rows_of, tokens

BaseFactory = Callable[..., BaseModel]


def gradients_of(bank: AdapterBank, names: list[str], ids_BT: Tensor) -> Tensor:
    """Adds to the bank's gradients. Returns each row's loss."""
    with bank.rows(names, ids_BT.shape[1]):
        found = losses(bank.model, ids_BT)
        found.sum().backward()
    return found.detach()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM"])
def test_gradients_are_those_of_each_alone(tiny_base: BaseFactory, architecture: str, checkpointed: bool) -> None:
    """In fp64, with adapters of several ranks and methods, without some modules, of as many rows and of others."""
    base = tiny_base(architecture, std=0.05)
    specs = {n: s for n, s in SPECS.items() if architecture != "Phi3ForCausalLM" or len(s.target_modules) == 7}
    bank = make_bank(base, specs)
    if checkpointed:
        bank.model.train()
        bank.model.activation_checkpointing_enable({"use_reentrant": False})
    names = rows_of(bank, {name: ROWS[name] for name in specs})
    ids_BT = tokens(len(names))
    found_B = gradients_of(bank, names, ids_BT)
    for name, spec in specs.items():
        model, parameters = alone(base, bank, name, spec)
        losses(model, own_rows(ids_BT, names, name)).sum().backward()
        assert bank.gradients(name).keys() == parameters.keys()
        bound = 1e-5 if spec.method == "dora" else 1e-10  # whose module computes in fp32
        assert distance(bank.gradients(name), ((n, p.grad) for n, p in parameters.items())) < bound
    with torch.no_grad(), bank.rows(names, ids_BT.shape[1]):
        before = {name: {n: g.clone() for n, g in bank.gradients(name).items()} for name in specs}
        torch.testing.assert_close(losses(bank.model, ids_BT), found_B)
    assert all(torch.equal(g, before[name][n]) for name in specs for n, g in bank.gradients(name).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_bit_of_an_adapter_depends_on_others(base: BaseModel, dtype: str) -> None:
    """Their tokens, weights and learning rates are replaced by others, and their gradients by what is not finite."""

    def run(kept: str, seed: int, rate: float) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        bank = make_bank(base, dtype=dtype)
        names = rows_of(bank, ROWS)
        ids_BT = torch.where(
            torch.tensor([[name == kept] for name in names]), tokens(len(names)), tokens(len(names), seed=seed)
        )
        for name in SPECS:
            if name != kept:
                move(bank, name, seed + 100)
        loss_B = gradients_of(bank, names, ids_BT)
        gradients = {n: g.clone() for n, g in bank.gradients(kept).items()}
        if seed:
            next(iter(bank.gradients("twin" if kept != "twin" else "one").values())).fill_(torch.inf)
        spec = OptimizerSpec(learning_rate=1e-2)
        update(bank, [Update(name, 1e-2 if name == kept else rate, spec) for name in SPECS])
        masters = {n: m.clone() for n, m in bank.masters(kept).items()}
        return loss_B[[i for i, name in enumerate(names) if name == kept]], gradients, masters

    for kept in ("eight", "twin", "vera", "dora"):
        first, second = run(kept, 0, 1e-2), run(kept, 7, 3e-1)
        assert torch.equal(first[0], second[0])
        for ours, theirs in zip(first[1:], second[1:], strict=True):
            assert all(torch.equal(tensor, theirs[n]) for n, tensor in ours.items())


@pytest.mark.parametrize(
    "spec", [SPECS["three"], LoraSpec(rank=8, dropout=0.1), VeraSpec(rank=8, d_initial=0.3), SPECS["dora"]]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_begins_as_attach_begins(base: BaseModel, spec: AdapterSpec, dtype: str) -> None:
    bank = AdapterBank(plain(base, getattr(torch, dtype)), base, dtype)  # type: ignore[arg-type]
    bank.add("before", SPECS["eight"], seed=1)
    bank.add("it", spec, seed=5)
    model = plain(base, getattr(torch, dtype))
    attach(model, spec, seed=5)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert bank.masters("it").keys() == parameters.keys()
    assert all(torch.equal(m, parameters[n].float()) for n, m in bank.masters("it").items())


@pytest.mark.parametrize(
    "spec", [SPECS["eight"], SPECS["three"], SPECS["vera"], VeraSpec(rank=4, save_projection=True), SPECS["dora"]]
)
def test_files_are_those_of_a_run_with_these_weights(tiny_base: BaseFactory, spec: AdapterSpec, tmp_path: Path) -> None:
    base = tiny_base(std=0.05, dtype=torch.bfloat16)
    bank = make_bank(base, SPECS | {"it": spec}, dtype="bfloat16")
    model, _ = alone(base, bank, "it", spec)
    model.config.name_or_path = base.name
    state = bank.state("it")
    for dtype in ("bfloat16", "float32"):
        as_dtype = getattr(torch, dtype)
        theirs = adapter_files(model, spec, {n: m.to(as_dtype) for n, m in state.masters.items()})
        assert bank.files("it", dtype).config == theirs.config
        save_adapter(model, spec, tmp_path / "theirs", trained={n: m.to(as_dtype) for n, m in state.masters.items()})
        bank.write("it", tmp_path / "ours", dtype)
        ours, wanted = ({f.name: f.read_bytes() for f in (tmp_path / of).iterdir()} for of in ("ours", "theirs"))
        assert ours == wanted == files_in_memory(bank.files("it", dtype))
        assert ours == bank.files_in_memory("it", dtype)
        with torch.no_grad():
            for master in bank.masters("it").values():
                master.add_(0.25)
        changed = bank.files_in_memory("it", dtype)  # as a later version
        assert ours != changed == files_in_memory(bank.files("it", dtype))
        bank.restore("it", state)
    assert {t.dtype for t in bank.files("it").tensors.values()} <= {torch.bfloat16, torch.float32}


def test_it_goes_on_from_an_adapter_and_from_a_state(base: BaseModel, tmp_path: Path) -> None:
    bank = make_bank(base, dtype="float32")
    bank.write("eight", tmp_path)
    weights = read_adapter(tmp_path, base.config)
    bank.add("next", SPECS["eight"], seed=0, weights=weights)
    assert all(torch.equal(m, bank.masters("eight")[n]) for n, m in bank.masters("next").items())
    with pytest.raises(SpecError, match="modules or ranks"):
        bank.add("wrong", SPECS["one"], seed=0, weights=weights)
    with pytest.raises(SpecError, match="scaled by"):
        bank.add("wrong", LoraSpec(rank=8, alpha=5), seed=0, weights=weights)
    with pytest.raises(SpecError, match="is lora, and vera"):
        bank.add("wrong", SPECS["vera"], seed=0, weights=weights)
    assert "wrong" not in bank

    names, ids_BT, spec = rows_of(bank, {"eight": 2}), tokens(2), OptimizerSpec(learning_rate=1e-2)

    def step() -> dict[str, Tensor]:
        gradients_of(bank, names, ids_BT)
        update(bank, [Update("eight", 1e-2, spec)])
        return {n: m.clone() for n, m in bank.masters("eight").items()}

    step()
    saved = bank.state("eight")
    expected = step()
    bank.restore("eight", saved)
    assert bank.num_updates("eight") == 1
    assert all(torch.equal(m, expected[n]) for n, m in step().items())
    with pytest.raises(ValueError, match="other parameters"):
        bank.restore("one", saved)


def test_dora_goes_on_with_its_magnitudes(base: BaseModel, tmp_path: Path) -> None:
    """From a published adapter, and from a state of a machine whose norms differ in last bits."""
    bank = make_bank(base, {"dora": SPECS["dora"]}, dtype="float32")
    bank.write("dora", tmp_path)
    bank.add("next", SPECS["dora"], seed=0, weights=read_adapter(tmp_path, base.config))
    assert distance(bank.masters("next"), bank.masters("dora").items()) < 1e-5
    state = bank.state("dora")
    assert state.initial
    bank.restore("dora", state._replace(initial={n: t * 1.001 for n, t in state.initial.items()}))
    for n, master in bank.masters("dora").items():
        if "magnitude" in n:
            began = state.initial[n.replace("lora_magnitude_change", "initial_square_O")]
            expected = state.masters[n] + (began * 1.001).sqrt() - began.sqrt()
            torch.testing.assert_close(master, expected)


def test_slots_are_given_back_and_taken_again(base: BaseModel) -> None:
    bank = make_bank(base, dtype="float32")
    names = rows_of(bank, ROWS)
    gradients_of(bank, names, tokens(len(names)))
    kept = {n: g.clone() for n, g in bank.gradients("twin").items()}
    bank.remove("eight")
    for number in range(5):  # the bucket grows
        bank.add(f"more-{number}", SPECS["other"], seed=number)
    assert not any(g.any() for g in bank.gradients("more-0").values())
    assert all(torch.equal(g, kept[n]) for n, g in bank.gradients("twin").items())
    fresh = AdapterBank(plain(base, torch.float32), base, "float32")
    fresh.add("it", SPECS["other"], seed=3)
    assert all(torch.equal(m, bank.masters("more-3")[n]) for n, m in fresh.masters("it").items())
    order = bank.order(["more-4", "twin", "more-0", "vera"])
    assert order.index("more-0") < order.index("twin") < order.index("more-4")
    with pytest.raises(NotFoundError, match="no adapter 'eight'"):
        bank.masters("eight")
    with pytest.raises(ConflictError, match="remove it first"):
        bank.add("twin", SPECS["twin"], seed=0)


def test_rows_must_be_the_models(base: BaseModel) -> None:
    bank = make_bank(base, dtype="float32")
    first, second = bank.order(["one", "three"])
    for names in ([second, first], [first, second, first]):
        with pytest.raises(ValueError, match="in the order"), bank.rows(names, 12):
            pass
    with pytest.raises(ValueError, match="was told 24"), bank.rows([first, second], 12):
        losses(bank.model, tokens(3))
    ids_BT = tokens(2)
    expected = losses(plain(base, torch.float32), ids_BT)
    with bank.rows([first, second], 12):
        assert not torch.equal(losses(bank.model, ids_BT), expected)
        with bank.without_adapters():
            assert torch.equal(losses(bank.model, ids_BT), expected)
    assert torch.equal(losses(bank.model, ids_BT), expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (MissSpec(), "not miss"),
        (Ia3Spec(), "not ia3"),
        (RoadSpec(), "not road"),
        (AloraSpec(invocation_tokens=(1, 2)), "not alora"),
        (LongLoraSpec(), "train_embeddings"),
        (LoraSpec(train_norms=True), "train_norms"),
        (LoraSpec(init="pissa"), "adapter.init"),
    ],
)
def test_what_changes_the_base_is_trained_alone(base: BaseModel, spec: AdapterSpec, message: str) -> None:
    bank = AdapterBank(plain(base, torch.float32), base, "float32")
    with pytest.raises(UnsupportedError, match=f"train acme alone: .*{message}"):
        bank.add("acme", spec, seed=0)
    assert not any(isinstance(module, nn.Linear) for n, module in bank.model.named_modules() if "base_layer" in n)
    bank.add("acme", LongLoraSpec(train_embeddings=False, train_norms=False), seed=0)


def test_experts_are_trained_alone_and_fused_modules_whole(tiny_base: BaseFactory) -> None:
    base = tiny_base("MixtralForCausalLM")
    bank = AdapterBank(plain(base, torch.float32), base, "float32")
    with pytest.raises(UnsupportedError, match="train acme alone: down_proj, gate_proj, up_proj are experts"):
        bank.add("acme", LoraSpec(), seed=0)
    bank.add("acme", LoraSpec(target_modules=("q_proj", "o_proj")), seed=0)
    base = tiny_base("Phi3ForCausalLM")
    bank = AdapterBank(plain(base, torch.float32), base, "float32")
    with pytest.raises(UnsupportedError, match="name all of them or none"):
        bank.add("acme", LoraSpec(target_modules=("q_proj", "o_proj")), seed=0)


def test_dropout_is_an_adapters_own(base: BaseModel) -> None:
    """Masks are the same in a recomputation, and other ones in another pass; the expectation is the undropped."""
    spec = LoraSpec(rank=4, dropout=0.5, target_modules=("q_proj", "k_proj", "down_proj"))
    specs: dict[str, AdapterSpec] = {"one": spec, "two": spec, "vera": VeraSpec(rank=8, dropout=0.5)}
    found = []
    for checkpointed in (False, True):
        bank = make_bank(base, specs, dtype="float32")
        bank.model.train()
        if checkpointed:
            bank.model.activation_checkpointing_enable({"use_reentrant": False})
        names = rows_of(bank, {"one": 1, "two": 2, "vera": 1})
        found.append([gradients_of(bank, names, tokens(4)) for _ in range(2)])
        found[-1] += [g.clone() for name in specs for g in bank.gradients(name).values()]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    first, second = found[0][:2]
    assert not torch.equal(first, second)
    bank.model.eval()
    with torch.no_grad(), bank.rows(names, 12):
        undropped = losses(bank.model, tokens(4))
    assert not torch.equal(undropped, first)
    drawn = [bank.num_updates("one")]
    bank.model.train()
    with torch.no_grad():
        for _ in range(200):
            with bank.rows(["one"], 1):
                part = bank._shared.rows.parts[0]  # type: ignore[union-attr]
                drawn.append(float(part.drop(torch.ones(1, 64), part.bucket.paths[1]).mean()))
    assert abs(sum(drawn[1:]) / 200 - 1) < 0.02
