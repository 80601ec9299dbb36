"""VeRA (Kopiczko et al., 2024): two trained vectors a module around one frozen random pair (A, B)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel

from loray.bases.config import ModelConfig
from loray.errors import BaseMismatch, IntegrityError, shown
from loray.methods.base import Method, SavedTensors, ServedMatrix, StoredModule, input_of, shapes
from loray.methods.pairs import PAIR_NAMES, PairKey, drawn_digest
from loray.methods.weights import AdapterWeights, AddedWeights, LoraWeights, PoolRows, SharedProjection
from loray.spec import Default, VeraSpec
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import VeraConfig
    from torch import Tensor

_MAX_KEY = 1 << 63


@dataclass(frozen=True, slots=True)
class VeraWeights(AddedWeights):
    """y += b ⊙ (B[:O] (d ⊙ (A[:, :I] x))) with the adapter's SharedProjection."""

    d_R: Tensor
    b_O: Tensor

    @property
    def method(self) -> Literal["vera"]:
        return "vera"

    @property
    def rank(self) -> int:
        return self.d_R.shape[0]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"vera_lambda_d": self.d_R, "vera_lambda_b": self.b_O}

    def shapes(self, out: int, width: int, pair: SharedProjection | None) -> Mapping[str, tuple[int, ...]]:
        assert pair is not None
        return {"vera_lambda_d": (pair.a_RI.shape[0],), "vera_lambda_b": (out,)}

    def rows(self) -> Iterator[PoolRows]:
        yield PoolRows("vera_d", self.d_R[None])
        yield PoolRows("vera_b", self.b_O[None])

    def as_lora(self, pair: SharedProjection | None, width: int) -> LoraWeights:
        """Compute B' = Λb B[:O] and A' = Λd A[:, :I] in fp32, with scale 1."""
        assert pair is not None
        inner_RI = self.d_R.float()[:, None] * pair.a_RI[:, :width].float()
        outer_OR = self.b_O.float()[:, None] * pair.b_OR[: self.b_O.shape[0]].float()
        return LoraWeights(inner_RI, outer_OR, scale=1.0)


class Vera(Method):
    """A x is computed once for the modules with the same input, unless dropout gives every module an input of its
    own.
    """

    name: ClassVar[AdapterMethod] = "vera"
    stored_as: ClassVar[AdapterMethod] = "vera"
    spec: ClassVar[type[BaseModel]] = VeraSpec
    peft_type = "VERA"
    defaults: ClassVar[Mapping[str, Default]] = {
        "adapter.rank": Default("of the frozen pair: costs arithmetic, hardly any parameters"),
        "adapter.d_initial": Default("the paper's"),
        "adapter.target_modules": Default("all linear layers, as the paper has it on Llama"),
        "adapter.projection_prng_key": Default("adapters share the pair only where key, rank and modules agree"),
        "adapter.save_projection": Default("the pair is drawn again from its key, so an adapter is kilobytes"),
        "optimizer.learning_rate": Default("about ten times LoRA's: two vectors a module learn slowly", 1e-2, 4e-3),
    }
    pair_rate = Default("ten times LoRA's, as without pairs", 5e-4, 5e-5)
    max_rank = 1 << 12  # the pair is drawn from a key, so that a small file asks for many numbers
    products_backward = 1  # the pair is frozen
    keeps_embedding_rows = False  # VeraConfig has no trainable_token_indices

    def matrices(self, spec: VeraSpec, model: ModelConfig) -> Iterator[ServedMatrix]:
        for module, (out, _) in shapes(spec, model).items():
            yield ServedMatrix(module, "vera_d", 1, spec.rank)
            yield ServedMatrix(module, "vera_b", 1, out)

    def factors(self, spec: VeraSpec, model: ModelConfig) -> int:
        if spec.dropout:
            return super().factors(spec, model)
        own = shapes(spec, model)
        widths = {input_of(module): width for module, (_, width) in own.items()}
        return spec.rank * (sum(out for out, _ in own.values()) + sum(widths.values()))

    def saved(self, spec: VeraSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Count the operands of the two vectors."""
        own = shapes(spec, model)
        outs = [out for out, _ in own.values()]
        inner = self.saved_together(spec, model, element_bytes=element_bytes, is_shared=is_shared).nbytes
        return SavedTensors("adapter", element_bytes * sum(outs) + inner, element_bytes * max(outs))

    def saved_together(
        self, spec: VeraSpec, model: ModelConfig, *, element_bytes: int, is_shared: bool
    ) -> SavedTensors:
        """Count A x alone: the outer product is computed again."""
        own = shapes(spec, model)
        products = len(own) if spec.dropout else len({input_of(module) for module in own})
        return SavedTensors("adapter", element_bytes * spec.rank * products, element_bytes * spec.rank)

    def pair_elements(self, spec: VeraSpec, model: ModelConfig) -> int:
        (_, max_in), (max_out, _) = _pair_of(spec, model).shapes
        return spec.rank * (max_out + max_in)

    def pair_reads(self, spec: VeraSpec, model: ModelConfig) -> int:
        """Count A once for the modules with the same input, and of B the rows of the widest of them."""
        reads: dict[tuple[str, ...], int] = {}
        for module, (out, width) in shapes(spec, model).items():
            reads[input_of(module)] = max(reads.get(input_of(module), 0), width + out)
        return spec.rank * sum(reads.values())

    def inject(self, model: Any, spec: VeraSpec) -> None:
        from loray.methods.vera_module import inject_vera

        inject_vera(model, spec)

    def peft_config(self, spec: VeraSpec, **options: Any) -> VeraConfig:
        from peft import VeraConfig

        with warnings.catch_warnings():
            # PEFT warns that the pair is drawn again when the adapter is loaded; the manifest pins its digest.
            warnings.filterwarnings("ignore", message="Specified to not save vera_A and vera_B")
            return VeraConfig(
                r=spec.rank,
                target_modules=list(spec.target_modules),
                projection_prng_key=spec.projection_prng_key,
                save_projection=spec.save_projection,
                vera_dropout=spec.dropout,
                d_initial=spec.d_initial,
                task_type="CAUSAL_LM",
                **options,
            )

    def check_config(self, config: Mapping[str, Any], *, source: str) -> None:
        super().check_config(config, source=source)
        key = config.get("projection_prng_key", 0)
        if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < _MAX_KEY:
            raise IntegrityError(f"{source}: projection_prng_key is {shown(key)}, not a whole number from 0 on")

    def read(self, module: StoredModule) -> VeraWeights:
        module.check(("vera_lambda_b", "vera_lambda_d"), "vera_lambda_d")
        return VeraWeights(d_R=module.parts["vera_lambda_d"], b_O=module.parts["vera_lambda_b"])

    def pair_key(
        self, config: Mapping[str, Any], base: ModelConfig, modules: Set[str], stored: Mapping[str, Tensor], label: str
    ) -> PairKey:
        if not modules:
            raise IntegrityError(f"{label}: a VeRA adapter without a module")
        outs, widths = zip(*(base.module_shape(module) for module in modules), strict=True)
        drawn = PairKey(config.get("projection_prng_key", 0), config["r"], max(widths), max(outs))
        if not stored:
            return drawn
        if set(stored) != {"A", "B"}:
            raise IntegrityError(f"{label}: only vera_{next(iter(stored))} is stored; both or neither must be")
        a_shape, b_shape = tuple(stored["A"].shape), tuple(stored["B"].shape)
        if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != drawn.rank:
            raise IntegrityError(f"{label}: the stored pair is not of rank {drawn.rank}, as adapter_config.json says")
        if a_shape[1] < drawn.max_in or b_shape[0] < drawn.max_out or a_shape[0] != b_shape[1]:
            raise BaseMismatch(f"{label}: the stored pair {a_shape}, {b_shape} is too small for this base")
        return drawn

    def stored_beside(self, spec: VeraSpec, model: Any) -> dict[str, Tensor]:
        from loray.methods.vera_module import draw_pair

        if not spec.save_projection:
            return {}
        adapted = (m.base_layer for p, m in model.named_modules() if p.rpartition(".")[2] in spec.target_modules)
        widths, outs = zip(*((linear.in_features, linear.out_features) for linear in adapted), strict=True)
        pair = draw_pair(spec.projection_prng_key, spec.rank, max(widths), max(outs))
        return dict(zip(PAIR_NAMES, (pair.a_RI, pair.b_OR), strict=True))

    def differences(self, spec: VeraSpec, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
        has_same_modules = {key.module for key in weights.modules} == set(spec.target_modules)
        if has_same_modules and (weights.pair is None or weights.pair.digest != drawn_digest(_pair_of(spec, base))):
            yield "its random pair is another one (projection_prng_key)"


def _pair_of(spec: VeraSpec, model: ModelConfig) -> PairKey:
    outs, widths = zip(*shapes(spec, model).values(), strict=True)
    return PairKey(spec.projection_prng_key, spec.rank, max(widths), max(outs))
