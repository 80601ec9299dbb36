"""Who is measured: a base as it is, under a scaled RoPE, or with an adapter; each a transformers model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.spec import DType, RopeParameters
from loray.spec import Subject as Kind


class Subject(NamedTuple):
    """`rope` None: the base's own. `adapter`: a folder in PEFT's format."""

    kind: Kind
    rope: RopeParameters | None = None
    adapter: Path | None = None


def subjects(rope: RopeParameters | None, adapter: Path | None, *, compare: bool) -> tuple[Subject, ...]:
    """What `rope` and `adapter` make of a base; with `compare`, before it what they are made of."""
    stages = [Subject("base")]
    if rope is not None:
        stages.append(Subject("base_scaled", rope))
    if adapter is not None:
        stages.append(Subject("adapter", rope, adapter))
    return tuple(stages) if compare else (stages[-1],)


def load(base: BaseModel, subject: Subject, *, dtype: DType, device: torch.device) -> Any:
    """A transformers causal language model with dense attention, frozen, for evaluation.

    What PEFT makes of the adapter's folder is what is measured, in the dtypes of its file. Raises UnsupportedError,
    BaseMismatch or IntegrityError where it cannot be served on `base` either.
    """
    config = AutoConfig.from_pretrained(base.path)
    config.use_cache = False
    if subject.rope is not None:
        config.rope_parameters = subject.rope.to_hf()
    model = AutoModelForCausalLM.from_pretrained(
        base.path, config=config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    if subject.adapter is not None:
        from peft import PeftModel  # takes a second, and bases have no need of it

        read_adapter(subject.adapter, base.config)  # its errors say what is wrong with the folder
        model = PeftModel.from_pretrained(model, subject.adapter, autocast_adapter_dtype=False).get_base_model()
    return model.requires_grad_(False).to(device).eval()
