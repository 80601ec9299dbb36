"""DoRA (Liu et al., 2024): LoRA whose outputs are scaled by trained magnitudes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.methods.base import ServedMatrix, shapes
from loray.methods.lora import Lora
from loray.methods.weights import MAGNITUDE
from loray.spec import DoraSpec, LoraSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import LoraConfig


class Dora(Lora):
    name: ClassVar[AdapterMethod] = "dora"
    stored_as: ClassVar[AdapterMethod] = "dora"
    spec: ClassVar[type[BaseModel]] = DoraSpec
    fp32_parts = (MAGNITUDE,)

    def matrices(self, spec: LoraSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        for matrix in super().matrices(spec, model):
            yield matrix
            if matrix.role == "lora_b":
                yield matrix._replace(role="dora", rows=1)

    def _saved_elements(self, spec: LoraSpec, model: ModelConfig) -> int:
        """Count what is scaled, too: the outputs of the base and of B."""
        return super()._saved_elements(spec, model) + 2 * sum(out for out, _ in shapes(spec, model).values())

    def step_products(self, spec: LoraSpec, model: ModelConfig) -> int:
        """Count those of the norms, as PEFT computes B A in every module: A and B of a unit matrix."""
        own = shapes(spec, model).values()
        return model.num_layers * sum(width * spec.rank * (out + width) for out, width in own)

    def workspace(self, spec: LoraSpec, model: ModelConfig) -> int:
        """Count the elements of W + s B A."""
        return max(out * width for out, width in shapes(spec, model).values())

    def peft_config(self, spec: LoraSpec, **options: Any) -> LoraConfig:
        return super().peft_config(spec, use_dora=True, **options)
