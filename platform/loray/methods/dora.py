"""DoRA (Liu et al., 2024): LoRA whose outputs are scaled by trained magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.methods.base import SavedTensors, ServedMatrix, shapes
from loray.methods.lora import Lora
from loray.spec import DTYPE_BYTES, DoraSpec, LoraSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor


class Dora(Lora):
    name: ClassVar[AdapterMethod] = "dora"
    stored_as: ClassVar[AdapterMethod] = "dora"
    adapts_experts: ClassVar[bool] = False
    spec: ClassVar[type[BaseModel]] = DoraSpec

    def matrices(self, spec: LoraSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        for matrix in super().matrices(spec, model):
            yield matrix
            if matrix.role == "lora_b":
                yield matrix._replace(role="dora", rows=1)

    def saved(self, spec: LoraSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count what is scaled, too: the outputs without their bias, in fp32."""
        found = super().saved(spec, model, element_bytes=element_bytes, is_shared=is_shared)
        scaled = [DTYPE_BYTES["float32"] * out for out, _ in shapes(spec, model).values()]
        return SavedTensors(found.name, found.nbytes + sum(scaled), max(found.block, *scaled))

    def step_products(self, spec: LoraSpec, model: ModelConfig) -> int:
        """Count those of the norms, of A with W and with itself, and of B."""
        own = shapes(spec, model).values()
        return model.num_layers * spec.rank * sum(out * width + spec.rank * (out + width) for out, width in own)

    def inject(self, model: Any, spec: Any) -> None:
        from loray.methods.dora_module import inject_dora

        inject_dora(model, spec)

    def published(self, spec: LoraSpec, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from loray.methods.dora_module import published_magnitudes

        return published_magnitudes(model, tensors)

    def peft_config(self, spec: LoraSpec, **options: Any) -> LoraConfig:
        return super().peft_config(spec, use_dora=True, **options)
