"""One training run, in loray's loop or with PEFT's model in a plain loop; data, batches, schedule and clipping agree.

PEFT is used as its documentation says: `get_peft_model` over a bf16 base with the adapter in fp32, the model's loss
over all positions, AdamW over the trained parameters, `save_pretrained`.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quality.setting import Run
from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.registry import BaseModel
from loray.methods import method_of
from loray.spec import TrainSpec
from loray.train.checkpoint import FolderReporter
from loray.train.data.batches import BatchStream
from loray.train.data.rows import Dataset, load_data
from loray.train.loop import held_out_loss, train
from loray.train.mesh import Mesh
from loray.train.model import count_parameters
from loray.train.objectives import objective_of
from loray.train.optimizer import learning_rate

_CPU = torch.device("cpu")


def read_data(base: BaseModel, spec: TrainSpec) -> Dataset:
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    length = spec.data.max_length or base.config.max_position_embeddings
    # All seeds hold out the same rows, because their losses are compared.
    return load_data(spec.data, tokenizer, max_length=length, max_eval_rows=spec.evaluation.max_rows, seed=0)


def train_ours(spec: TrainSpec, base: BaseModel, data: Dataset, folder: Path) -> Run:
    reporter = FolderReporter(folder, keep=1)
    with tempfile.TemporaryDirectory() as workdir:
        state = train(spec, base, data, reporter=reporter, workdir=Path(workdir))
    steps = [e for e in reporter.events if e["event"] == "step"]
    counts = [e["num_tokens"] for e in steps]
    tokens = [n - before for n, before in zip(counts, [0, *counts], strict=False)]
    seconds = tuple(n / e["tokens_per_s"] for n, e in zip(tokens, steps, strict=True))
    (start,) = (e for e in reporter.events if e["event"] == "start")
    adapter = reporter.checkpoints[-1].path / "adapter"
    assert state.eval_loss is not None  # the loop raises otherwise
    losses = tuple(e["loss"] for e in steps)
    return _run(spec, losses, state.eval_loss, seconds, start["num_trainable"], adapter)


def train_peft(spec: TrainSpec, base: BaseModel, data: Dataset, folder: Path) -> Run:
    torch.manual_seed(spec.seed)
    plain = AutoModelForCausalLM.from_pretrained(base.path, dtype=getattr(torch, spec.chosen_dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(plain, method_of(spec.adapter).peft_config(spec.adapter))
    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    stream = BatchStream(data.train, spec.batch, max_length=data.max_length, seed=spec.seed, per_step=1)
    num_steps = spec.max_steps or stream.num_steps(spec.num_epochs or 1.0)
    losses, seconds = [], []
    for step in range(1, num_steps + 1):
        began = time.perf_counter()
        (batch,) = stream.next_step()
        adam.param_groups[0]["lr"] = learning_rate(step, num_steps, spec.optimizer)
        labels = batch.labels_BT
        loss = wrapped(**batch.model_inputs(_CPU), labels=labels, shift_labels=labels, use_cache=False).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, spec.optimizer.max_grad_norm or float("inf"))
        adam.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - began)
    inner = wrapped.base_model.model
    objective = objective_of(inner, spec)
    held_out = held_out_loss(objective, objective, data.evaluation, spec, device=_CPU, mesh=Mesh.build(1, _CPU)).loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return _run(spec, tuple(losses), held_out, tuple(seconds), count_parameters(wrapped).trainable, folder)


def _run(
    spec: TrainSpec,
    losses: tuple[float, ...],
    held_out: float,
    seconds: tuple[float, ...],
    num_parameters: int,
    adapter: Path,
) -> Run:
    nbytes = (adapter / WEIGHTS_FILE).stat().st_size
    rate, seed = spec.optimizer.learning_rate, spec.seed
    return Run(rate, seed, losses, held_out, seconds, num_parameters, nbytes, str(adapter))
