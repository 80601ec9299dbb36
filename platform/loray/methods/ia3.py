"""IA³ (Liu et al., 2022): trained factors of what linear modules put out, or of what they take in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import UnsupportedError
from loray.methods.base import Method, SavedTensors, ServedMatrix, StoredModule, shapes
from loray.methods.weights import AdapterWeights, LoraWeights, PoolRows, SharedProjection
from loray.spec import DTYPE_BYTES, Default
from loray.spec import Method as AdapterMethod
from loray.spec.methods import Ia3Spec

if TYPE_CHECKING:
    from peft import IA3Config
    from torch import Tensor

_PART = "ia3_l"
# The MLP multiplies what `up_proj` puts out by silu(gate) and gives it to `down_proj`: factors of the latter's inputs
# are factors of the former's outputs. Other modules share their input, or have attention before them.
_INPUT, _SOURCE = "down_proj", "up_proj"


@dataclass(frozen=True, slots=True)
class Ia3Weights:
    """y = l ⊙ (W x + bias) with l of shape (O, 1), or y = W (l ⊙ x) + bias with l of shape (1, I)."""

    factors: Tensor

    @property
    def method(self) -> Literal["ia3"]:
        return "ia3"

    @property
    def rank(self) -> int:
        return 0

    @property
    def is_of_input(self) -> bool:
        return self.factors.shape[0] == 1

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {_PART: self.factors}

    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        return {_PART: (1, width) if self.is_of_input else (out, 1)}

    def rows(self) -> Iterator[PoolRows]:
        """Yield the factors less one: so they are as exact in 16 bits as what they change."""
        yield PoolRows("scale", self.factors.float().view(1, -1) - 1, module=_SOURCE if self.is_of_input else None)

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        raise UnsupportedError("IA³ multiplies outputs, which no LoRA does: take the adapter merged into its base")

    def merged(self, weight_OI: Tensor, pair: SharedProjection | None) -> Tensor:
        return weight_OI.float() * self.factors.float()

    def merged_bias(self, bias_O: Tensor) -> Tensor:
        return bias_O if self.is_of_input else bias_O.float() * self.factors.float().view(-1)


class Ia3(Method):
    name: ClassVar[AdapterMethod] = "ia3"
    stored_as: ClassVar[AdapterMethod] = "ia3"
    spec: ClassVar[type[BaseModel]] = Ia3Spec
    peft_type = "IA3"
    defaults: ClassVar[Mapping[str, Default]] = {
        "adapter.target_modules": Default("the paper's: keys, values, and what the MLP computes between its matrices"),
        "optimizer.learning_rate": Default("factors begin at 1; large bases learn at the paper's 3e-3", 2e-2, 3e-3),
    }
    pair_rate = Default("a tenth, as LoRA's", 2e-3, 3e-4)
    max_rank = 0
    fp32_parts = (_PART,)
    keeps_embedding_rows = False  # IA3Config has no trainable_token_indices

    def matrices(self, spec: Ia3Spec, model: ModelConfig) -> Iterator[ServedMatrix]:
        for module in dict.fromkeys(_SOURCE if m == _INPUT else m for m in spec.target_modules):
            yield ServedMatrix(module, "scale", 1, model.module_shape(module)[0])

    def trained(self, spec: Ia3Spec, model: ModelConfig) -> Iterator[int]:
        return (width if m == _INPUT else out for m, (out, width) in shapes(spec, model).items())

    def factors(self, spec: Ia3Spec, model: ModelConfig) -> int:
        return sum(self.trained(spec, model))

    def saved(self, spec: Ia3Spec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count what is multiplied: a module's output, and in fp32 the input of down_proj, which PEFT copies to it."""
        own = shapes(spec, model)
        kept = [DTYPE_BYTES["float32"] * width for m, (_, width) in own.items() if m == _INPUT]
        kept += [element_bytes * out for m, (out, _) in own.items() if m != _INPUT]
        return SavedTensors("adapter", sum(kept), max(kept))

    def peft_config(self, spec: Ia3Spec, **options: Any) -> IA3Config:
        from peft import IA3Config

        return IA3Config(
            target_modules=list(spec.target_modules),
            feedforward_modules=[m for m in spec.target_modules if m == _INPUT],
            task_type="CAUSAL_LM",
            **options,
        )

    def read(self, module: StoredModule) -> Ia3Weights:
        module.check((_PART,))
        weights = Ia3Weights(module.parts[_PART])
        if weights.is_of_input and not module.label.endswith(_INPUT):
            raise UnsupportedError(
                f"{module.label} multiplies its input (feedforward_modules), which is served for {_INPUT} alone: train "
                f"it with feedforward_modules=['{_INPUT}']"
            )
        return weights

    def differences(self, spec: Ia3Spec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
        of_outputs = (key for key, module in weights.modules.items() if module.parts[_PART].shape[0] > 1)
        if any(key.module == _INPUT for key in of_outputs):
            yield f"its {_INPUT} multiplies outputs (feedforward_modules)"
