"""Training steps by loray and by PEFT in transformers' Trainer, in turn in one process on the same rows; prints JSON.

    python -m benchmarks.training.workers.trainer HOME BASE METHOD ROWS TOKENS REPEATS

    ours      a recipe of METHOD (lora, vera, longlora) on q, k, v and o, bf16, with its default attention
    trainer   PEFT's configuration of the same adapter in `Trainer` with `bf16=True`, on a base in bf16

Rows are full, and nothing is padded or checkpointed. AdamW, rate and clipping agree. A step of ours runs before each of
Trainer's, which its callbacks time: from the start of the step to its end, without evaluation, logs and saving.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.world import on_this_machine
from loray.bases.registry import BaseModel, get_base
from loray.recipes.resolve import resolve
from loray.spec import LongLoraSpec, LoraSpec, TrainSpec, VeraSpec
from loray.train.data.batches import collate, pack_rows
from loray.train.mesh import Mesh
from loray.train.model import BaseWeights, build_model
from loray.train.objectives import objective_of
from loray.train.strategies import prepare

_RATE = 1e-4
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def main(home: Path, name: str, method: str, rows: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds and losses of each step, by system. The first step of each warms up and has no seconds."""
    base, spec = get_base(home, name), recipe(method, rows, tokens)
    # frequencies like those of text, so that the loss can fall
    ids = np.random.default_rng(0).zipf(1.3, (repeats + 1, rows, tokens)) % base.config.vocab_size
    turns = _Turns(base, spec, ids)
    with tempfile.TemporaryDirectory(prefix="trainer-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _trainer(base, spec, ids, turns, folder).train()
    seconds = {"ours": turns.our_seconds[1:], "trainer": turns.their_seconds[1:]}
    return {"seconds": seconds, "losses": {"ours": turns.our_losses, "trainer": turns.their_losses}}


def recipe(method: str, rows: int, tokens: int) -> TrainSpec:
    fields: dict[str, Any] = {"method": method, "target_modules": _MODULES}
    fields |= {"rank": 256} if method == "vera" else {"rank": 16, "alpha": 32}
    scaling = {"type": "linear", "factor": 2, "original_context": tokens // 2} if method == "longlora" else None
    made = TrainSpec.model_validate(
        {
            "name": "benchmark",
            "adapter": fields,
            "rope_scaling": scaling,
            "data": {"train": "unused", "max_length": tokens},
            "batch": {"rows": rows},
            "optimizer": {"learning_rate": _RATE, "max_grad_norm": 1.0},
            "max_steps": 1,
        }
    )
    return on_this_machine(made)


class _Turns(TrainerCallback):  # type: ignore[misc]
    """Our steps, each before the one of Trainer on the same rows, and the times of both."""

    def __init__(self, base: BaseModel, spec: TrainSpec, ids: Any) -> None:
        device, self._ids = torch.device("cpu"), ids
        model, weights = build_model(base, spec).train(), BaseWeights(base, spec.chosen_dtype)
        self._strategy = prepare(objective_of(model, spec), spec, Mesh.build(1, device).world, device, weights)
        self.our_seconds: list[float] = []
        self.their_seconds: list[float] = []
        self.our_losses: list[float] = []
        self.their_losses: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows = [(row, np.ones(len(row), np.bool_)) for row in self._ids[state.global_step]]
        began = time.perf_counter()
        batch = collate(pack_rows(rows), tuple((i,) for i in range(len(rows))), packed=False)
        loss = self._strategy.forward_backward(batch, totals={"targets": batch.num_targets}, last=True)
        self._strategy.step(_RATE)
        self._began = time.perf_counter()
        self.our_seconds.append(self._began - began)
        self.our_losses.append(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.their_seconds.append(time.perf_counter() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.their_losses.append(logs["loss"])


class _InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def _trainer(base: BaseModel, spec: TrainSpec, ids: Any, turns: _Turns, folder: str) -> Trainer:
    config = AutoConfig.from_pretrained(base.path)
    config.use_cache = False
    if (rope := resolve(spec, base.config).rope) is not None:
        config.rope_parameters = rope.to_hf()
    plain = AutoModelForCausalLM.from_pretrained(base.path, config=config, dtype=getattr(torch, spec.chosen_dtype))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=ids.shape[1],
        max_steps=len(ids),
        learning_rate=_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids.reshape(-1, ids.shape[-1])]
    model = get_peft_model(plain, _peft(spec))
    return _InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[turns])


def _peft(spec: TrainSpec) -> PeftConfig:
    adapter = spec.adapter
    if isinstance(adapter, VeraSpec):
        return VeraConfig(r=adapter.rank, target_modules=_MODULES, projection_prng_key=0, save_projection=False)
    extra = ["embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"]
    saved = extra if isinstance(adapter, LongLoraSpec) else None
    assert isinstance(adapter, LoraSpec)
    return LoraConfig(r=adapter.rank, lora_alpha=int(2 * adapter.rank), target_modules=_MODULES, modules_to_save=saved)


if __name__ == "__main__":
    home, name, method, *numbers = sys.argv[1:]
    sys.stdout.write("\n" + json.dumps(main(Path(home), name, method, *map(int, numbers))) + "\n")
