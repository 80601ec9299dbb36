"""MiSS (Kang & Yin, 2024): one trained matrix a module, on sums of the module's input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import UnsupportedError, shown
from loray.methods.base import Method, SavedTensors, ServedMatrix, StoredModule, shapes
from loray.methods.weights import AddedWeights, LoraWeights, PoolRows, SharedProjection
from loray.spec import Default, MissSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import MissConfig
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class MissWeights(AddedWeights):
    """y += Dᵀ h with h_r = Σₖ x_{r + k R}: LoRA whose A is fixed, and never stored. `width`: I, the length of x."""

    d_RO: Tensor
    width: int

    @property
    def method(self) -> Literal["miss"]:
        return "miss"

    @property
    def rank(self) -> int:
        return self.d_RO.shape[0]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"miss_block": self.d_RO}

    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        return {"miss_block": (self.rank, out)}

    def rows(self) -> Iterator[PoolRows]:
        import torch  # shapes and headers are read without it

        yield PoolRows("summed_a", torch.empty(self.rank, self.width, device="meta"))
        yield PoolRows("lora_b", self.d_RO)

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        """Write A down, (R, I) of zeros and ones in fp32, with scale 1."""
        import torch

        a_RI = (torch.arange(width) % self.rank == torch.arange(self.rank)[:, None]).float()
        return LoraWeights(a_RI, self.d_RO.T, scale=1.0)


class Miss(Method):
    name: ClassVar[AdapterMethod] = "miss"
    stored_as: ClassVar[AdapterMethod] = "miss"
    spec: ClassVar[type[BaseModel]] = MissSpec
    peft_type = "MISS"
    defaults: ClassVar[Mapping[str, Default]] = {
        "adapter.rank": Default("as many parameters as LoRA of half of it has where modules are square"),
        "optimizer.learning_rate": Default("LoRA's on small bases; lower where a sum has more inputs", 1e-3, 2e-5),
    }
    pair_rate = Default("LoRA's on small bases; lower where a sum has more inputs", 5e-5, 5e-7)
    has_variants = True
    keeps_embedding_rows = False  # MissConfig has no trainable_token_indices

    def problems(self, spec: MissSpec, model: ModelConfig) -> Iterator[str]:
        yield from super().problems(spec, model)
        for module, (_, width) in shapes(spec, model).items():
            if spec.rank > width:
                yield f"adapter.rank is {spec.rank}, and {module} has {width} inputs to sum: take at most {width}"

    def matrices(self, spec: MissSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        for module, (out, _) in shapes(spec, model).items():
            yield ServedMatrix(module, "lora_b", spec.rank, out)

    def factors(self, spec: MissSpec, model: ModelConfig) -> int:
        """Count an addition for each input, too."""
        return sum(spec.rank * out + width for out, width in shapes(spec, model).values())

    def saved(self, spec: MissSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count the sums, which are the input of every D, and with dropout the mask of every module's input."""
        sums = element_bytes * spec.rank
        own = shapes(spec, model)
        masks = [element_bytes * width for _, width in own.values()] if spec.dropout else []
        return SavedTensors("adapter", sums * len(own) + sum(masks), max(sums, *masks, 0))

    def peft_config(self, spec: MissSpec, **options: Any) -> MissConfig:
        from peft import MissConfig

        return MissConfig(
            r=spec.rank,
            miss_dropout=spec.dropout,
            target_modules=list(spec.target_modules),
            task_type="CAUSAL_LM",
            **options,
        )

    def check_config(self, config: Mapping[str, Any], *, source: str) -> None:
        super().check_config(config, source=source)
        if not isinstance(variant := config.get("init_weights", True), bool):
            raise UnsupportedError(
                f"{source}: init_weights is {shown(variant)}, another variant of MiSS, which is not served as it is: "
                "make LoRA of it, `loray adapters import FOLDER --rank N`"
            )

    def read(self, module: StoredModule) -> MissWeights:
        module.check(("miss_block",), "miss_block")
        return MissWeights(module.parts["miss_block"], module.width)
