"""The measured models: a base, the base under a scaled RoPE, and the base with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from loray.adapters.inject import attach, load_weights
from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from loray.bases.registry import BaseModel
from loray.files import file_sha256
from loray.planning.measuring import num_shards
from loray.spec import DType, RopeParameters, Subject, TrainSpec
from loray.train.evaluation.measured import Measured
from loray.train.hooks.dense import DENSE
from loray.train.mesh import ALONE, Mesh
from loray.train.model import load_model, model_config
from loray.train.weights.deferred import BaseWeights, stand_ins, without_weights


class MeasuredModel(NamedTuple):
    """`rope` None: the base's RoPE. `adapter`: a folder in PEFT's format."""

    subject: Subject
    rope: RopeParameters | None = None
    adapter: Path | None = None


def subjects(rope: RopeParameters | None, adapter: Path | None, *, compare: bool) -> tuple[MeasuredModel, ...]:
    """The base with `rope` and `adapter`. With `compare` also the base before it, and the base with `rope` alone."""
    stages = [MeasuredModel("base")]
    if rope is not None:
        stages.append(MeasuredModel("base_scaled", rope))
    if adapter is not None:
        stages.append(MeasuredModel("adapter", rope, adapter))
    return tuple(stages) if compare else (stages[-1],)


def identity(base: BaseModel, measured: MeasuredModel, *, dtype: DType, device: torch.device) -> dict[str, Any]:
    """What decides the figures that `load`'s model gives for the same tokens, as JSON. Hashes the adapter's files."""
    files = [] if measured.adapter is None else [measured.adapter / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return {
        "base": base.fingerprint,
        "rope": measured.rope and measured.rope.to_hf(),
        "adapter": [file_sha256(path) for path in files if path.is_file()],
        "dtype": dtype,
        "device": device.type,
        "attention": DENSE,
    }


def load(
    base: BaseModel,
    measured: MeasuredModel,
    *,
    dtype: DType,
    device: torch.device,
    mesh: Mesh = ALONE,
    trained_by: TrainSpec | None = None,
) -> Measured:
    """The model with dense attention, frozen, for evaluation.

    trained_by  the recipe whose workers measure, as `mesh`: they share the weights where its strategy does, or where it
                quantised them, since a base is measured and served as it is. None: PEFT loads the adapter, in the
                dtypes of its file
    A collective call. Raises UnsupportedError, BaseMismatch or IntegrityError where the adapter could not be served on
    `base`, either.
    """
    weights = None if measured.adapter is None else read_adapter(measured.adapter, base.config)
    if trained_by is not None and num_shards(trained_by) > 1 and mesh.world.size > 1:
        from loray.train.strategies.fsdp2 import shard  # takes a second, and what is whole does not need it

        source = BaseWeights(base, dtype)
        model = without_weights(model_config(base, measured.rope), dtype=dtype, attention=DENSE)
        if weights is not None:
            with stand_ins(model, source):
                attach(model, trained_by.adapter, seed=trained_by.seed)
            load_weights(model, weights)
        sharded: Measured = shard(Measured(model.requires_grad_(False), mesh), mesh.world, device, source)
        return sharded.eval()
    model = load_model(base, dtype=dtype, rope=measured.rope)
    if measured.adapter is not None:
        from peft import PeftModel  # takes a second, and bases do not need it

        model = PeftModel.from_pretrained(model, measured.adapter, autocast_adapter_dtype=False).get_base_model()
    return Measured(model.requires_grad_(False), mesh).to(device).eval()
