"""LoRA (Hu et al., 2021), and LongLoRA (Chen et al., 2024), whose adapter is LoRA with norms and embedding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import IntegrityError, shown
from loray.methods.base import Method, SavedTensors, ServedMatrix, StoredModule, input_of, shapes
from loray.methods.expert_lora import PARAMETERS, ExpertLoraWeights
from loray.methods.weights import MAGNITUDE, AdapterWeights, LoraWeights
from loray.spec import MLP_MODULES, Default, LongLoraSpec, LoraSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor


class Lora(Method):
    name: ClassVar[AdapterMethod] = "lora"
    stored_as: ClassVar[AdapterMethod] = "lora"
    spec: ClassVar[type[BaseModel]] = LoraSpec
    peft_type = "LORA"
    adapts_experts: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "adapter.rank": Default("capacity; 8 to 64 is usual"),
        "adapter.alpha": Default("twice the rank: the update is scaled by 2"),
        "adapter.use_rslora": Default("divides alpha by √rank instead of rank: for ranks above 64"),
        "adapter.init": Default("pissa, pissa_niter_16, olora: begin with a part of the base, publish twice the rank"),
    }
    pair_rate = Default("low: pairs are soon told apart, and then at the expense of both answers", 5e-5, 5e-6)

    def problems(self, spec: LoraSpec, model: ModelConfig) -> Iterator[str]:
        yield from super().problems(spec, model)
        if model.experts is not None and (own := {*MLP_MODULES} & {*spec.target_modules}):
            if len(own & {"gate_proj", "up_proj"}) == 1:
                yield "gate_proj and up_proj of experts are one parameter: name both in adapter.target_modules, or none"
            if spec.dropout:
                yield "adapter.dropout is not for experts, whose weights PEFT changes: set it to 0"
            if spec.init is not None:
                yield f"adapter.init: {spec.init} is not for experts: leave it out, or {', '.join(sorted(own))}"
        for module, (out, width) in shapes(spec, model).items():
            if spec.init is not None and spec.rank > min(out, width):
                yield (
                    f"adapter.rank is {spec.rank}, and {module} ({out} × {width}) has no such part: take at most "
                    f"{min(out, width)}, or leave out adapter.init"
                )

    def matrices(self, spec: LoraSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        rank = spec.published.rank
        for module, (out, width) in shapes(spec, model).items():
            experts = model.experts if module in MLP_MODULES else None
            rows = rank if experts is None else rank * experts.num
            if experts is None or module != "up_proj":  # whose A is gate_proj's
                yield ServedMatrix(module, "lora_a", rows, width)
            yield ServedMatrix(module, "lora_b", rows, out)

    def trained(self, spec: LoraSpec, model: ModelConfig) -> Iterator[int]:
        trained: Counter[tuple[str, str]] = Counter()
        for module, role, rows, width in self.matrices(spec.model_copy(update={"init": None}), model):
            is_of_two = model.experts is not None and module in PARAMETERS["gate_up_proj"]
            trained["gate_up_proj" if is_of_two else module, role] += rows * width
        return iter(trained.values())

    def factors(self, spec: LoraSpec, model: ModelConfig) -> int:
        return spec.published.rank * sum(
            (out + width) * (model.num_active_mlps if module in MLP_MODULES else 1)
            for module, (out, width) in shapes(spec, model).items()
        )

    def step_products(self, spec: LoraSpec, model: ModelConfig) -> int:
        """Count those of experts, to whose weights PEFT adds B A in every pass."""
        if model.experts is None:
            return 0
        own = (out * width for module, (out, width) in shapes(spec, model).items() if module in MLP_MODULES)
        return model.experts.num * spec.rank * sum(own)

    def frozen(self, spec: LoraSpec, model: ModelConfig) -> int:
        return 0 if spec.init is None else sum(self.trained(spec, model))

    def saved(self, spec: LoraSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count the input of every A, once for modules with the same input, and the input of every B.

        The input of o_proj is the output of attention, which is counted there; a sequence group joins the halves of the
        heads, which makes a copy. With dropout every module has an input of its own, and keeps the mask.
        """
        own, routed = shapes(spec, model), 0
        if model.experts is not None:  # whose changed weights want their inputs, which are put together by expert
            inputs = {input_of(m): width for m, (_, width) in own.items() if m in MLP_MODULES}
            routed = element_bytes * model.num_active_mlps * sum(inputs.values())
            own = {module: shape for module, shape in own.items() if module not in MLP_MODULES}
        inner = element_bytes * spec.published.rank * len(own) + routed
        each = {module: element_bytes * width for module, (_, width) in own.items()}
        if spec.dropout:
            return SavedTensors("adapter", inner + 2 * sum(each.values()), max(each.values()))
        shared = {input_of(module): nbytes for module, nbytes in each.items()}
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
            use_rslora=spec.use_rslora,
            task_type="CAUSAL_LM",
            **{"target_modules": list(spec.target_modules), **options},
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
        scales = {cast("LoraWeights | ExpertLoraWeights", module).scale for module in weights.modules.values()}
        if any(isinstance(module, ExpertLoraWeights) and not module.is_fused for module in weights.modules.values()):
            yield "it has tensors of each expert by itself"
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
