"""Strong random adapters, saved by PEFT, and the logits of transformers + PEFT with them, the engine's reference."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.methods.weights import AdapterWeights
from loray.spec import AdapterRef, Method, RopeParameters
from tests.fixtures.draws import Normal

NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]
LINEAR_ROPE = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0)


@dataclass(frozen=True)
class TestAdapter:
    __test__ = False

    ref: AdapterRef
    folder: Path
    rope: RopeParameters | None

    def load(self, base: BaseModel) -> AdapterWeights:
        return replace(read_adapter(self.folder, base.config), rope=self.rope)


@functools.lru_cache(maxsize=1)
def hf_model(base: BaseModel) -> Any:
    """In transformers and fp32. It is shared: change only copies that `sharing_weights` makes."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # tests capture what commands print
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()


def sharing_weights(model: Any, rope: RopeParameters | None = None) -> Any:
    """A copy of the model's modules with the same tensors, into which an adapter can be put; with other RoPE."""
    again = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    if rope is not None:
        again.config.rope_parameters = rope.to_hf()
        again.model.rotary_emb = type(again.model.rotary_emb)(again.config)
    return again


def make_adapter(
    base: BaseModel,
    folder: Path,
    config: Any,
    *,
    seed: int,
    rope: RopeParameters | None = None,
    std: float = 0.05,
    num_token_rows: int = 40,
    extras_std: float | None = None,
    context_length: int | None = None,
) -> TestAdapter:
    """Let PEFT inject `config`, fill every trained tensor with strong noise, and save it.

    `extras_std` is for norms and embedding rows, `std` unless given.
    """
    from peft import get_peft_model

    draw = Normal(seed)
    extras_std = std if extras_std is None else extras_std
    model = get_peft_model(sharing_weights(hf_model(base)), config)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if not p.requires_grad:
                continue
            noise = draw(*p.shape)
            if "vera_lambda_d" in name:
                p.copy_(0.3 + 0.2 * noise)
            elif "vera_lambda_b" in name:
                p.copy_(4 * std * noise)
            elif "embed_tokens" in name and p.dim() == 2 and p.shape[0] == base.config.vocab_size:
                p[:num_token_rows] += extras_std * noise[:num_token_rows]
            elif "magnitude" in name:
                p.mul_(1 + 0.5 * noise.clamp(-1, 1))
            elif "norm" in name:
                p.add_(extras_std * noise)
            else:
                p.copy_(std * noise)
    model.save_pretrained(folder)
    method: Method = "longlora" if rope is not None else "vera" if config.peft_type == "VERA" else "lora"
    if getattr(config, "use_dora", False):
        method = "dora"
    ref = AdapterRef(
        digest=hashlib.sha256(f"{folder}{seed}".encode()).hexdigest(),
        name=folder.name,
        version=1,
        method=method,
        base_fingerprint=base.fingerprint,
        context_length=context_length or base.config.max_position_embeddings,
        nbytes=sum(f.stat().st_size for f in folder.iterdir()),
    )
    return TestAdapter(ref, folder, rope)


def make_adapters(
    base: BaseModel, folder: Path, configs: Sequence[tuple[Any, RopeParameters | None]]
) -> list[TestAdapter]:
    """One of each of PEFT's configurations, with its RoPE, in a folder of its own."""
    return [make_adapter(base, folder / str(i), c, seed=i, rope=rope, std=0.1) for i, (c, rope) in enumerate(configs)]


class Oracle:
    """transformers + PEFT in `dtype`: a model for each adapter, all around the same base weights."""

    def __init__(self, base: BaseModel, adapters: Sequence[TestAdapter], dtype: torch.dtype = torch.float32) -> None:
        from peft import PeftModel

        plain = hf_model(base)
        if dtype != plain.dtype:
            plain = copy.deepcopy(plain).to(dtype)
        self._models: dict[str | None, Any] = {None: plain}
        for adapter in adapters:
            model = PeftModel.from_pretrained(sharing_weights(plain, adapter.rope), adapter.folder)
            self._models[adapter.ref.digest] = model.eval().to(dtype)

    def logits(self, ids: Sequence[int], adapter: TestAdapter | None) -> Tensor:
        """(tokens, vocabulary)"""
        model = self._models[adapter.ref.digest if adapter else None]
        with torch.inference_mode():
            logits: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
        return logits
