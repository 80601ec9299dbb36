"""`Method`, what an adapter method is to the rest of loray. Importing it loads no torch.

Shapes: R rank, I input width, O output width of a linear module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel

from loray.bases.config import FUSED, ModelConfig
from loray.errors import IntegrityError, UnsupportedError, shown
from loray.methods.expert_lora import peft_targets
from loray.methods.pairs import PairKey
from loray.methods.weights import AdapterWeights, ModuleWeights, Role
from loray.spec import MLP_MODULES, MODULES_BY_INPUT, AdapterSpec, Default
from loray.spec import Method as AdapterMethod

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor


ADAPTER = "default"  # PEFT's name of the adapter inside a model


class ServedMatrix(NamedTuple):
    """A matrix that a served adapter has in the pool, `rows` rows of `width` elements: mostly one that is trained."""

    module: str
    role: Role
    rows: int
    width: int


class SavedTensors(NamedTuple):
    """Tensors of one layer: bytes per token that the worker holds. `block` are those of the largest tensor."""

    name: str
    nbytes: int
    block: int


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A module as PEFT's files have it. Errors begin with `label`.

    parts        its tensors by their names below the module's path, without ".weight"
    rank, alpha  of this module, as `config` says them; alpha 0 where the method has none
    width        the module's inputs on the base that it is read for
    """

    label: str
    parts: Mapping[str, Tensor]
    config: Mapping[str, Any]
    rank: float
    alpha: float
    width: int

    def check(self, names: Iterable[str], ranked: str | None = None) -> None:
        """Raise UnsupportedError unless the parts have these names, and IntegrityError unless the first axis of the
        part `ranked` is as long as `config` says.
        """
        if set(self.parts) != set(names):
            raise UnsupportedError(f"{self.label} has {sorted(self.parts)}, not {' and '.join(sorted(names))}")
        if ranked is not None and (rank := self.parts[ranked].shape[0]) != self.rank:
            raise IntegrityError(
                f"{self.label} has rank {rank}, adapter_config.json says {self.rank:g}; save the adapter again"
            )


class Method(ABC):
    """An adapter method: how much it costs, how a model gets it, and in which form PEFT has it.

    name                 of recipes and manifests
    stored_as            the method of its weights, which do not say how they were trained
    spec                 its section of a recipe
    peft_type            of `adapter_config.json`
    defaults             of a recipe's fields, with their reasons, where they are not those of every method
    pair_rate            the learning rate with pairs of answers
    max_rank             of an adapter's file; 0: the method has no rank
    fp32_parts           tensors, by PEFT's names, that multiply outputs: a step changes them by less than 16 bits hold
                         beside 1, so they are trained and published in fp32, and do not decay
    products_backward    products with A and B in a backward pass, for each in a forward pass
    keeps_embedding_rows PEFT can store the changed rows of an embedding alone
    has_variants         PEFT has some that are not served, of which LoRA can be made
    adapts_experts       where a base has them in the place of MLPs
    """

    name: ClassVar[AdapterMethod]
    stored_as: ClassVar[AdapterMethod]
    spec: ClassVar[type[BaseModel]]
    peft_type: ClassVar[str]
    defaults: ClassVar[Mapping[str, Default]]
    pair_rate: ClassVar[Default]
    max_rank: ClassVar[int] = 1 << 14
    fp32_parts: ClassVar[tuple[str, ...]] = ()
    products_backward: ClassVar[int] = 2
    keeps_embedding_rows: ClassVar[bool] = True
    has_variants: ClassVar[bool] = False
    adapts_experts: ClassVar[bool] = False

    def rank(self, spec: Any) -> int:
        """Return the rank of the adapter's matrices; 0 for a method without."""
        return int(spec.rank) if self.max_rank else 0

    def problems(self, spec: Any, model: ModelConfig) -> Iterator[str]:
        """Say why `spec` could not be trained on this base."""
        own = [module for module in MLP_MODULES if module in spec.target_modules]
        if model.experts is not None and own and not self.adapts_experts:
            yield (
                f"this base has experts in the place of MLPs, which {self.name} does not adapt: leave "
                f"{', '.join(own)} out of adapter.target_modules"
            )

    # -- what it costs --

    @abstractmethod
    def matrices(self, spec: Any, model: ModelConfig) -> Iterator[ServedMatrix]:
        """Yield the matrices of one layer in the pool."""

    def trained(self, spec: Any, model: ModelConfig) -> Iterator[int]:
        """Yield the number of elements of each tensor that is trained in one layer."""
        return (matrix.rows * matrix.width for matrix in self.matrices(spec, model))

    @abstractmethod
    def saved(self, spec: Any, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Say what autograd keeps of a layer for the adapter. `is_shared`: a sequence group shares each row."""

    def saved_together(self, spec: Any, model: ModelConfig, *, element_bytes: int, is_shared: bool) -> SavedTensors:
        """Say the same of an adapter that is trained with others in one pass (`loray.train.many`)."""
        return self.saved(spec, model, element_bytes=element_bytes, is_shared=is_shared)

    def factors(self, spec: Any, model: ModelConfig) -> int:
        """Count the elements of A and B that a token is multiplied with in one layer."""
        return self.rank(spec) * sum(out + width for out, width in shapes(spec, model).values())

    def frozen(self, spec: Any, model: ModelConfig) -> int:
        """Count the elements of one layer that training keeps beside the base and does not train."""
        return 0

    def pair_elements(self, spec: Any, model: ModelConfig) -> int:
        """Count the frozen elements that all modules share; 0 where there are none."""
        return 0

    def pair_reads(self, spec: Any, model: ModelConfig) -> int:
        """Count those of them that a served step reads in one layer."""
        return 0

    def step_products(self, spec: Any, model: ModelConfig) -> int:
        """Count the products of a forward pass that do not depend on its tokens."""
        return 0

    # -- training --

    def tokenised(self, spec: Any, open_tokenizer: Callable[[], Any]) -> Any:
        """Add to `spec` what it has in tokens of the recipe's base. Raises SpecError where that cannot be found."""
        return spec

    def inject(self, model: Any, spec: Any) -> None:
        """Put the adapter into the modules that `spec` targets, as PEFT does, and freeze all other parameters. Random
        numbers come from torch's default generator.
        """
        from peft import inject_adapter_in_model

        inject_adapter_in_model(self.peft_config(spec, **peft_targets(spec, model)), model, adapter_name=ADAPTER)

    @abstractmethod
    def peft_config(self, spec: Any, **options: Any) -> PeftConfig:
        """Make the configuration with which PEFT makes the same adapter."""

    def check_config(self, config: Mapping[str, Any], *, source: str) -> None:
        """Raise IntegrityError where a number of `adapter_config.json` is none, or out of bounds."""
        rank = config.get("r")
        if not self.max_rank:
            return
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 < rank <= self.max_rank:
            raise IntegrityError(f"{source}: r is {shown(rank)}, not a number from 1 to {self.max_rank:,}")

    @abstractmethod
    def read(self, module: StoredModule) -> ModuleWeights:
        """Make the weights of a module. Only the shapes of its tensors are read. Raises as `StoredModule.check`."""

    def pair_key(
        self, config: Mapping[str, Any], base: ModelConfig, modules: Set[str], stored: Mapping[str, Tensor], label: str
    ) -> PairKey | None:
        """Name the pair (A, B) that is drawn where none is `stored`; None for a method without. Raises where one is
        stored and does not fit, with an error that begins with `label`.
        """
        return None

    def published(self, spec: Any, model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make what is published of `model`'s trained `tensors`, by PEFT's names."""
        return tensors

    def stored_beside(self, spec: Any, model: Any) -> dict[str, Tensor]:
        """Return what the adapter's file has beside the trained parameters, by the names of the file."""
        return {}

    def differences(self, spec: Any, weights: AdapterWeights, base: ModelConfig) -> Iterator[str]:
        """Say why training `spec` on `base` could not go on from `weights`, which are of this method, same modules and
        rank.
        """
        yield from ()


def shapes(spec: AdapterSpec, model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return (O, I) of the target modules, as the base has them."""
    return {m: model.module_shape(m) for m in stored_modules(spec.target_modules, model.fused)}


def stored_modules(modules: Sequence[str], found: Container[str]) -> tuple[str, ...]:
    """Name `modules` as a base has them that has those of `found`: where q, k and v are one, qkv_proj.

    Raises UnsupportedError where that has other modules, too.
    """
    names = dict.fromkeys(modules)
    for fused, parts in FUSED.items():
        own = [part for part in parts if part in names]
        if fused in found and own:
            if len(own) < len(parts):
                raise UnsupportedError(
                    f"this base has {', '.join(parts)} as one module, {fused}, and adapter.target_modules has only "
                    f"{', '.join(own)}: name all of them or none"
                )
            names = dict.fromkeys(fused if name in parts else name for name in names)
    return tuple(names)


def input_of(module: str) -> tuple[str, ...]:
    """Return the modules that have the same input as `module`, itself included."""
    return next((modules for modules in MODULES_BY_INPUT if module in modules), (module,))
