"""RoAd (Liao & Monz, 2024): pairs of a linear module's outputs, turned by trained angles and scaled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import BaseMismatch, IntegrityError, UnsupportedError, shown
from loray.methods.base import Method, SavedTensors, ServedMatrix, StoredModule, shapes
from loray.methods.weights import AdapterWeights, LoraWeights, PoolRows, SharedProjection
from loray.spec import DTYPE_BYTES, Default
from loray.spec import Method as AdapterMethod
from loray.spec.methods import RoadSpec, RoadVariant

if TYPE_CHECKING:
    from peft import RoadConfig
    from torch import Tensor

_PARTS = ("road_theta", "road_alpha")
# Angles, and scales, that a pair of outputs has: one, one of each output, or one of each of the four products.
_PER_PAIR: Mapping[RoadVariant, int] = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True, slots=True)
class RoadWeights:
    """y = R (W x + bias). In groups of `group_size` outputs R turns pairs: an output of the first half with the one as
    far into the second, y₁′ = α cos θ · y₁ − α sin θ · y₂ and y₂′ = α sin θ · y₁ + α cos θ · y₂ (equation 4), each
    product with an angle θ and a scale α of its own where the variant has as many.
    """

    theta: Tensor
    alpha: Tensor
    variant: RoadVariant
    group_size: int

    @property
    def method(self) -> Literal["road"]:
        return "road"

    @property
    def rank(self) -> int:
        return 0

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return dict(zip(_PARTS, (self.theta, self.alpha), strict=True))

    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        return dict.fromkeys(_PARTS, (out // 2 * _PER_PAIR[self.variant],))

    def columns(self) -> tuple[Tensor, Tensor]:
        """Compute the factors of each output itself, and of its partner, (O,) each in fp32."""
        theta, alpha, half = self.theta.float(), self.alpha.float(), self.group_size // 2
        own, other = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == "road_4":  # the first half of each two groups is of the outputs themselves
            own = own.view(-1, 2, self.group_size)[:, 0].flatten()
            other = other.view(-1, 2, self.group_size)[:, 1].flatten()
        elif self.variant == "road_1":  # both of a pair have the same
            own, other = (part.view(-1, 1, half).expand(-1, 2, half).flatten() for part in (own, other))
        other = other.view(-1, 2, half).clone()
        other[:, 0].neg_()
        return own, other.flatten()

    def rows(self) -> Iterator[PoolRows]:
        own_O, other_O = self.columns()
        yield PoolRows("scale", own_O[None] - 1)
        yield PoolRows("turn", other_O[None], self.group_size / 2)

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        raise UnsupportedError("RoAd turns outputs, which no LoRA does: take the adapter merged into its base")

    def merged(self, weight_OI: Tensor, pair: SharedProjection | None) -> Tensor:
        own_O, other_O = self.columns()
        halves = weight_OI.float().reshape(-1, 2, self.group_size // 2, weight_OI.shape[1])
        return own_O[:, None] * weight_OI.float() + other_O[:, None] * halves.flip(1).view(weight_OI.shape)

    def merged_bias(self, bias_O: Tensor) -> Tensor:
        return self.merged(bias_O[:, None], None)[:, 0]


class Road(Method):
    name: ClassVar[AdapterMethod] = "road"
    stored_as: ClassVar[AdapterMethod] = "road"
    spec: ClassVar[type[BaseModel]] = RoadSpec
    peft_type = "ROAD"
    defaults: ClassVar[Mapping[str, Default]] = {
        "adapter.variant": Default("one angle and scale a pair; road_2 and road_4 train two and four times as many"),
        "adapter.group_size": Default("PEFT's: pairs are half of it apart; it divides each rank's outputs of a module"),
        "optimizer.learning_rate": Default("angles begin at 0 and scales at 1; PEFT advises 1e-3", 1e-2, 1e-3),
    }
    pair_rate = Default("a tenth, as LoRA's", 1e-3, 1e-4)
    max_rank = 0
    fp32_parts = _PARTS
    keeps_embedding_rows = False  # RoadConfig has no trainable_token_indices

    def problems(self, spec: RoadSpec, model: ModelConfig) -> Iterator[str]:
        yield from super().problems(spec, model)
        for module, (out, _) in shapes(spec, model).items():
            if out % spec.group_size:
                yield f"adapter.group_size {spec.group_size} does not divide the {out} outputs of {module}: lower it"

    def matrices(self, spec: RoadSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        for module, (out, _) in shapes(spec, model).items():
            yield ServedMatrix(module, "scale", 1, out)
            yield ServedMatrix(module, "turn", 1, out)

    def trained(self, spec: RoadSpec, model: ModelConfig) -> Iterator[int]:
        return (out // 2 * _PER_PAIR[spec.variant] for out, _ in shapes(spec, model).values() for _ in _PARTS)

    def factors(self, spec: RoadSpec, model: ModelConfig) -> int:
        return 2 * sum(out for out, _ in shapes(spec, model).values())

    def saved(self, spec: RoadSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count a module's outputs and their partners, in fp32."""
        outs = [DTYPE_BYTES["float32"] * out for out, _ in shapes(spec, model).values()]
        return SavedTensors("adapter", 2 * sum(outs), max(outs))

    def peft_config(self, spec: RoadSpec, **options: Any) -> RoadConfig:
        from peft import RoadConfig

        return RoadConfig(
            variant=spec.variant,
            group_size=spec.group_size,
            target_modules=list(spec.target_modules),
            task_type="CAUSAL_LM",
            **options,
        )

    def check_config(self, config: Mapping[str, Any], *, source: str) -> None:
        variant, group = config.get("variant"), config.get("group_size")
        if variant not in get_args(RoadVariant):
            raise UnsupportedError(
                f"{source}: variant is {shown(variant)}, not one of {', '.join(get_args(RoadVariant))}"
            )
        if isinstance(group, bool) or not isinstance(group, int) or group < 2 or group % 2:
            raise IntegrityError(f"{source}: group_size is {shown(group)}, not an even number from 2 on")

    def read(self, module: StoredModule) -> RoadWeights:
        module.check(_PARTS)
        variant, group = module.config["variant"], module.config["group_size"]
        theta, alpha = (module.parts[part] for part in _PARTS)
        if (outputs := 2 * theta.shape[0] // _PER_PAIR[variant]) % group:
            raise BaseMismatch(f"{module.label} has {outputs} outputs, which group_size {group} does not divide")
        return RoadWeights(theta, alpha, variant, group)

    def differences(self, spec: RoadSpec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
        found: list[Any] = [*weights.modules.values()]
        if variants := {module.variant for module in found} - {spec.variant}:
            yield f"its variant is {', '.join(sorted(variants))}"
        if sizes := {module.group_size for module in found} - {spec.group_size}:
            yield f"its group_size is {', '.join(map(str, sorted(sizes)))}"
