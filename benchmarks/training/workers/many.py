"""Rounds of many adapters on one base, in one of three ways; prints JSON.

    python -m benchmarks.training.workers.many HOME BASE WAY DTYPE ADAPTERS EVERY ROWS TOKENS ROUNDS

    bank   all adapters in one forward and backward pass, as `loray train` has several recipes
    alone  one after the other by the loop of a single run, without its start: the base stays in memory
    peft   one after the other in one PeftModel for each method, with `set_adapter` before each step; PEFT keeps
           adapters in fp32

A round is one step of each adapter: ROWS rows of TOKENS tokens of its own, clipping, AdamW. ADAPTERS are of methods and
ranks, each list so many times: lora:8,16x4+vera:256x10 are eight of LoRA and ten of VeRA. Only one of EVERY is
trained. Adapters begin with the same weights in all ways, but that in bf16 PEFT's are not rounded.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import Tensor

from benchmarks.world import on_this_machine, peak_bytes
from loray.bases.registry import BaseModel, get_base
from loray.methods.attach import attach
from loray.planning.many import TOKENS_PER_PASS_ON_CPU
from loray.recommend import recipe_of
from loray.spec import AdapterSpec, LoraSpec, TrainSpec, VeraSpec
from loray.train.data.batches import TrainBatch, collate, pack_rows
from loray.train.many.bank import AdapterBank
from loray.train.many.optimizer import Update, update
from loray.train.many.passes import Part, joined
from loray.train.mesh import Mesh
from loray.train.model import BaseWeights, load_model
from loray.train.objectives import batch_loss, labelled_states, objective_of
from loray.train.strategies import prepare

Round = Callable[[Mapping[str, TrainBatch]], dict[str, float]]  # returns the mean loss of each before its step
_RATES = {"lora": 2e-4, "vera": 4e-3}


def main(
    home: Path, name: str, way: str, dtype: str, adapters: str, every: int, rows: int, tokens: int, rounds: int
) -> Any:
    """Seconds and losses of each round; the first one warms up and has no seconds."""
    base = get_base(home, name)
    specs = {name: spec for name, spec in specs_of(adapters).items() if int(name) % every == 0}
    asked = recipe_of(next(iter(specs.values())), tokens).model_copy(update={"dtype": dtype})
    recipe = on_this_machine(asked)
    step = {"bank": _bank, "alone": _alone, "peft": _peft}[way](base, specs, recipe)
    seconds: list[float] = []
    losses: list[dict[str, float]] = []
    for number in range(rounds + 1):
        batches = {n: _batch(base.config.vocab_size, rows, tokens, [number, int(n)]) for n in specs}
        began = time.perf_counter()
        losses.append(step(batches))
        if number:
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}


def specs_of(text: str) -> dict[str, AdapterSpec]:
    """Make the adapters that ADAPTERS describes, named by their numbers."""
    specs = list[AdapterSpec]()
    for part in text.split("+"):
        method, _, rest = part.partition(":")
        ranks, _, times = rest.partition("x")
        specs += [_spec(method, int(rank)) for rank in ranks.split(",")] * int(times or 1)
    return {str(i): spec for i, spec in enumerate(specs)}


def _spec(method: str, rank: int) -> AdapterSpec:
    return VeraSpec(rank=rank) if method == "vera" else LoraSpec(rank=rank, alpha=2 * rank)


def _batch(vocabulary: int, rows: int, tokens: int, seed: list[int]) -> TrainBatch:
    """Rows of tokens as frequent as those of texts."""
    ids = np.random.default_rng(seed).zipf(1.3, (rows, tokens)) % vocabulary
    packed = pack_rows([(row, np.ones(tokens, np.bool_)) for row in ids])
    return collate(packed, tuple((i,) for i in range(rows)), packed=False)


def _bank(base: BaseModel, specs: Mapping[str, AdapterSpec], recipe: TrainSpec) -> Round:
    bank = AdapterBank(load_model(base, dtype=recipe.chosen_dtype).train(), base, recipe.chosen_dtype)
    for name, spec in specs.items():
        bank.add(name, spec, seed=int(name))

    def step(batches: Mapping[str, TrainBatch]) -> dict[str, float]:
        losses = dict.fromkeys(batches, 0.0)
        parts = [Part.of(n, batch, weight=1 / batch.num_targets) for n, batch in batches.items()]
        for each in joined(parts, TOKENS_PER_PASS_ON_CPU, bank.order):
            with bank.rows(each.names, each.batch.input_ids_BT.shape[1]):
                states = labelled_states(bank.model, each.batch)
                rows_N = states.learned_BT.nonzero()[:, 0]
                weighted_N = states.losses() * each.weights_B[rows_N]
                weighted_N.sum().backward()  # type: ignore[no-untyped-call]
            sums_B = torch.zeros(len(each.names)).index_add_(0, rows_N, weighted_N.detach().float())
            for name, loss in zip(each.names, sums_B.tolist(), strict=True):
                losses[name] += loss
        update(bank, [Update(name, _RATES[specs[name].method], recipe.optimizer) for name in batches])
        return losses

    return step


def _alone(base: BaseModel, specs: Mapping[str, AdapterSpec], recipe: TrainSpec) -> Round:
    """Models with one adapter each, which share the parameters of the base."""
    plain = load_model(base, dtype=recipe.chosen_dtype).train()
    mesh, weights = Mesh.build(1, torch.device("cpu")), BaseWeights(base, recipe.chosen_dtype)
    strategies = {}
    for name, spec in specs.items():
        model = copy.deepcopy(plain, {id(p): p for p in plain.parameters()})
        attach(model, spec, seed=int(name))
        own = recipe.model_copy(update={"adapter": spec})
        strategies[name] = prepare(objective_of(model, own), own, mesh.world, torch.device("cpu"), weights)

    def step(batches: Mapping[str, TrainBatch]) -> dict[str, float]:
        losses = {}
        for name, batch in batches.items():
            losses[name] = strategies[name].forward_backward(batch, totals={"targets": batch.num_targets}, last=True)
            strategies[name].step(_RATES[specs[name].method])
        return losses

    return step


def _peft(base: BaseModel, specs: Mapping[str, AdapterSpec], recipe: TrainSpec) -> Round:
    wrapped: dict[str, Any] = {}  # by method
    optimizers: dict[str, torch.optim.AdamW] = {}
    own = recipe.optimizer
    betas = (own.beta1, own.beta2)
    for name, spec in specs.items():
        config = _peft_config(spec)
        torch.manual_seed(int(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if spec.method not in wrapped:
                plain = load_model(base, dtype=recipe.chosen_dtype)
                wrapped[spec.method] = get_peft_model(plain, config, adapter_name=name).train()
            else:
                wrapped[spec.method].add_adapter(name, config)
        wrapped[spec.method].set_adapter(name)
        trained = [p for p in wrapped[spec.method].parameters() if p.requires_grad]
        rate = _RATES[spec.method]
        optimizers[name] = torch.optim.AdamW(trained, lr=rate, betas=betas, eps=own.eps, weight_decay=own.weight_decay)

    def step(batches: Mapping[str, TrainBatch]) -> dict[str, float]:
        losses = {}
        for name, batch in batches.items():
            peft_model, optimizer = wrapped[specs[name].method], optimizers[name]
            peft_model.set_adapter(name)
            loss = batch_loss(peft_model.base_model.model, batch) / batch.num_targets
            loss.backward()  # type: ignore[no-untyped-call]
            trained: list[Tensor] = optimizer.param_groups[0]["params"]
            torch.nn.utils.clip_grad_norm_(trained, own.max_grad_norm or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
            losses[name] = float(loss.detach())
        return losses

    return step


def _peft_config(spec: AdapterSpec) -> Any:
    config: dict[str, Any] = {"r": spec.rank, "target_modules": list(spec.target_modules)}  # type: ignore[union-attr]
    if isinstance(spec, VeraSpec):
        return VeraConfig(**config, projection_prng_key=0, save_projection=False, d_initial=spec.d_initial)
    return LoraConfig(**config, lora_alpha=spec.alpha)  # type: ignore[union-attr]


if __name__ == "__main__":
    home, name, way, dtype, adapters, *numbers = sys.argv[1:]
    every, rows, tokens, rounds = map(int, numbers)
    printed = main(Path(home), name, way, dtype, adapters, every, rows, tokens, rounds)
    sys.stdout.write(json.dumps(printed) + "\n")
