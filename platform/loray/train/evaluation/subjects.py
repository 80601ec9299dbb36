"""The measured models: a base, the base under a scaled RoPE, and the base with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from loray.bases.registry import BaseModel
from loray.files import file_sha256
from loray.spec import DType, RopeParameters, Subject
from loray.train.hooks.dense import DENSE
from loray.train.model import load_model


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


def load(base: BaseModel, measured: MeasuredModel, *, dtype: DType, device: torch.device) -> Any:
    """A transformers causal language model with dense attention, frozen, for evaluation.

    PEFT loads the adapter, in the dtypes of its file. Raises UnsupportedError, BaseMismatch or IntegrityError where it
    could not be served on `base`, either.
    """
    model = load_model(base, dtype=dtype, rope=measured.rope)
    if measured.adapter is not None:
        from peft import PeftModel  # takes a second, and bases do not need it

        read_adapter(measured.adapter, base.config)  # its errors say what is wrong with the folder
        model = PeftModel.from_pretrained(model, measured.adapter, autocast_adapter_dtype=False).get_base_model()
    return model.requires_grad_(False).to(device).eval()
