"""LoRA (Hu et al., 2021), and LongLoRA (Chen et al., 2024), whose adapter is LoRA with norms and embedding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import IntegrityError, shown
from loray.methods.base import Method, SavedTensors, ServedMatrix, StoredModule, input_of, shapes
from loray.methods.weights import MAGNITUDE, AdapterWeights, LoraWeights
from loray.spec import Default, LongLoraSpec, LoraSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor


class Lora(Method):
    name: ClassVar[AdapterMethod] = "lora"
    stored_as: ClassVar[AdapterMethod] = "lora"
    spec: ClassVar[type[BaseModel]] = LoraSpec
    peft_type = "LORA"
    defaults: ClassVar[Mapping[str, Default]] = {
        "adapter.rank": Default("capacity; 8 to 64 is usual"),
        "adapter.alpha": Default("twice the rank: the update is scaled by 2"),
        "adapter.use_rslora": Default("divides alpha by √rank instead of rank: for ranks above 64"),
        "adapter.init": Default("pissa, pissa_niter_16, olora: begin with a part of the base, publish twice the rank"),
    }
    pair_rate = Default("low: pairs are soon told apart, and then at the expense of both answers", 5e-5, 5e-6)

    def problems(self, spec: LoraSpec, model: ModelConfig) -> Iterator[str]:
        yield from super().problems(spec, model)
        for module, (out, width) in shapes(spec, model).items():
            if spec.init is not None and spec.rank > min(out, width):
                yield (
                    f"adapter.rank is {spec.rank}, and {module} ({out} × {width}) has no such part: take at most "
                    f"{min(out, width)}, or leave out adapter.init"
                )

    def matrices(self, spec: LoraSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        rank = spec.published.rank
        for module, (out, width) in shapes(spec, model).items():
            yield ServedMatrix(module, "lora_a", rank, width)
            yield ServedMatrix(module, "lora_b", rank, out)

    def trained(self, spec: LoraSpec, model: ModelConfig) -> Iterator[int]:
        return super().trained(spec.model_copy(update={"init": None}), model)

    def factors(self, spec: LoraSpec, model: ModelConfig) -> int:
        return super().factors(spec.published, model)

    def frozen(self, spec: LoraSpec, model: ModelConfig) -> int:
        return 0 if spec.init is None else sum(self.trained(spec, model))

    def saved(self, spec: LoraSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count the input of every A, once for modules with the same input, and the input of every B.

        The input of o_proj is the output of attention, which is counted there; a sequence group joins the halves of the
        heads, which makes a copy. With dropout every module has an input of its own, and keeps the mask.
        """
        own = shapes(spec, model)
        inner = element_bytes * spec.published.rank * len(spec.target_modules)
        inputs = {module: element_bytes * width for module, (_, width) in own.items()}
        if spec.dropout:
            return SavedTensors("adapter", inner + 2 * sum(inputs.values()), max(inputs.values()))
        shared = {input_of(module): nbytes for module, nbytes in inputs.items()}
        if not is_shared:
            shared.pop(input_of("o_proj"), None)
        return SavedTensors("adapter", inner + sum(shared.values()), max(shared.values(), default=inner))

    def inject(self, model: Any, spec: LoraSpec) -> None:
        from loray.methods.lora_module import inject_decomposed

        if spec.init is None:
            super().inject(model, spec)
        else:
            inject_decomposed(model, spec)

    def published(self, spec: LoraSpec, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from loray.methods.lora_module import published_pairs

        return tensors if spec.init is None else published_pairs(model, tensors)

    def peft_config(self, spec: LoraSpec, **options: Any) -> LoraConfig:
        from peft import LoraConfig

        spec = spec.published
        return LoraConfig(
            r=spec.rank,
            lora_alpha=int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
            lora_dropout=spec.dropout,
            target_modules=list(spec.target_modules),
            use_rslora=spec.use_rslora,
            task_type="CAUSAL_LM",
            **options,
        )

    def check_config(self, config: Mapping[str, Any], *, source: str) -> None:
        super().check_config(config, source=source)
        alpha = config.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < math.inf:
            raise IntegrityError(f"{source}: lora_alpha is {shown(alpha)}, not a number")

    def read(self, module: StoredModule) -> LoraWeights:
        parts = module.parts
        module.check({"lora_A", "lora_B", *([MAGNITUDE] if module.config.get("use_dora") else [])}, "lora_A")
        rank = parts["lora_A"].shape[0]
        scale = module.alpha / (math.sqrt(rank) if module.config.get("use_rslora") else rank)
        return LoraWeights(parts["lora_A"], parts["lora_B"], scale, parts.get(MAGNITUDE))

    def differences(self, spec: LoraSpec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
        scales = {module.as_lora(None, 0).scale for module in weights.modules.values()}
        if not all(math.isclose(s, spec.scale) for s in scales):
            yield f"its update is scaled by {', '.join(f'{s:g}' for s in sorted(scales))} (alpha, use_rslora)"


class LongLora(Lora):
    name: ClassVar[AdapterMethod] = "longlora"
    spec: ClassVar[type[BaseModel]] = LongLoraSpec
    defaults: ClassVar[Mapping[str, Default]] = {
        **Lora.defaults,
        "adapter.rank": Default("the paper's: embeddings and norms carry what more rank does not"),
        "adapter.target_modules": Default("the paper's: attention, beside embeddings and norms"),
        "attention.type": Default("while training; evaluated and served dense", LongLoraSpec.usual_attention),
        "batch.order": Default("concat of texts: joined and cut at the context, as in the paper; else shuffled"),
        "batch.rows": Default("a row fills the context", 1),
        "batch.accumulation": Default("rows of a step on one worker; the paper has 64 over all", 4, 8),
        "optimizer.learning_rate": Default("high for tens of steps; the paper's 2e-5 on large bases", 1e-3, 2e-5),
        "optimizer.beta2": Default("the paper's on large bases: few, long steps", 0.999, 0.95),
        "optimizer.schedule": Default("the paper's: constant after the warm-up", "constant"),
        "max_steps": Default("a thousand in the paper; a small base shows a gain after tens", 50, 1000),
        "num_epochs": Default("instead of max_steps"),
    }
