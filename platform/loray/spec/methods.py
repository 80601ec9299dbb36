"""Adapter methods as a recipe says them: LoRA, DoRA, aLoRA, LongLoRA, VeRA, MiSS, IA³, RoAd."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from loray.spec.fields import Frozen

Method = Literal["lora", "dora", "vera", "miss", "longlora", "ia3", "road", "alora"]
Initialisation = Literal["pissa", "pissa_niter_16", "olora"]  # PEFT's names of `init_lora_weights`
RoadVariant = Literal["road_1", "road_2", "road_4"]
LinearModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION_MODULES: tuple[LinearModule, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES: tuple[LinearModule, ...] = ("gate_proj", "up_proj", "down_proj")
LINEAR_MODULES = ATTENTION_MODULES + MLP_MODULES
# The modules of a layer, those with the same input together.
MODULES_BY_INPUT: tuple[tuple[LinearModule, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)

InvocationTokens = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=256)]


class SlowRates(NamedTuple):
    """Learning rates, of rows and of pairs, below which a method hardly learns, and what a warning says of them."""

    rates: tuple[float, float]
    why: str


class _AdapterSpec(Frozen):
    """Fields of all methods. `train_embeddings` (the input embedding) and `train_norms` (all RMSNorms): trained and
    published as well.

    usual_attention  while training, where a recipe does not say
    held_whole       what strategies that take parameters apart cannot hold; None: they can
    trains_b         LoRA's B, which LoRA+ gives a learning rate of its own
    slow_below       rates that are a warning; None: there are none
    is_invoked       it is the base before an invocation
    """

    usual_attention: ClassVar[Literal["dense", "s2"]] = "dense"
    held_whole: ClassVar[str | None] = None
    trains_b: ClassVar[bool] = True
    slow_below: ClassVar[SlowRates | None] = None
    is_invoked: ClassVar[bool] = False

    target_modules: tuple[LinearModule, ...] = Field(default=LINEAR_MODULES, min_length=1)
    train_embeddings: bool = False
    train_norms: bool = False

    @property
    def invoked_by(self) -> tuple[int, ...] | None:
        """The tokens from whose last occurrence in a row on the adapter is active; None: from the start."""
        return None

    @property
    def published(self) -> Self:
        """The adapter as it is published and served, and as which a later run goes on from it."""
        return self


class _RankedSpec(Frozen):
    """Fields of methods with matrices."""

    rank: int = Field(gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class LoraSpec(_AdapterSpec, _RankedSpec):
    """LoRA (Hu et al., 2021): h = W x + (alpha/rank) B A x; rsLoRA divides by √rank instead.

    `init` null: A random and B zero; else a part of W, its largest singular values (PiSSA; Meng et al., 2024; with
    `niter_16` by a randomised decomposition, which takes seconds where the exact takes minutes) or the first columns
    of its QR decomposition (OLoRA; Büyükakyüz, 2024). Then W without that part is trained beside, and what is published
    is the change, LoRA of twice the rank on the base as it is.
    """

    method: Literal["lora"] = "lora"
    rank: int = Field(default=16, gt=0)
    alpha: float = Field(default=32, gt=0)
    use_rslora: bool = False
    init: Initialisation | None = None

    @property
    def scale(self) -> float:
        """Return the factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def published(self) -> Self:
        if self.init is None:
            return self
        alpha = self.alpha * (math.sqrt(2) if self.use_rslora else 2)  # the scale stays
        return self.model_copy(update={"rank": 2 * self.rank, "alpha": alpha, "init": None})


class DoraSpec(LoraSpec):
    """DoRA (Liu et al., 2024): h = m ⊙ (W + (alpha/rank) B A) x / ‖W + (alpha/rank) B A‖, norms over each output's
    inputs in fp32; the magnitudes m are trained beside A and B, and begin as the norms of W.
    """

    method: Literal["dora"] = "dora"  # type: ignore[assignment]
    init: None = None


class AloraSpec(LoraSpec):
    """aLoRA (Greenewald et al., 2025): LoRA that is active from the last occurrence of its invocation on. Before it the
    model is the base, whose keys and values all such adapters share. `invocation` is a text, of which the base's
    tokenizer makes `invocation_tokens`; None: what the base's chat template puts before an answer.
    """

    is_invoked: ClassVar[bool] = True

    method: Literal["alora"] = "alora"  # type: ignore[assignment]
    rank: int = Field(default=32, gt=0)
    alpha: float = Field(default=64, gt=0)
    init: None = None
    invocation: str | None = Field(default=None, min_length=1, max_length=4096)
    invocation_tokens: InvocationTokens | None = None

    @property
    def invoked_by(self) -> tuple[int, ...] | None:
        return self.invocation_tokens

    @model_validator(mode="after")
    def _leaves_the_base(self) -> Self:
        if self.train_embeddings or self.train_norms:
            raise ValueError(
                "aLoRA leaves what is before its invocation to the base: train neither embeddings nor norms"
            )
        return self


class LongLoraSpec(LoraSpec):
    """LongLoRA (Chen et al., 2024): LoRA plus embeddings and norms. S2-Attn is the default of a recipe with it."""

    usual_attention: ClassVar[Literal["dense", "s2"]] = "s2"

    method: Literal["longlora"] = "longlora"  # type: ignore[assignment]
    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    target_modules: tuple[LinearModule, ...] = Field(default=ATTENTION_MODULES, min_length=1)
    train_embeddings: bool = True
    train_norms: bool = True


class VeraSpec(_AdapterSpec, _RankedSpec):
    """VeRA (Kopiczko et al., 2024): h = W x + Λb B Λd A x with one frozen random pair (A, B) for all layers."""

    trains_b: ClassVar[bool] = False
    slow_below: ClassVar[SlowRates | None] = SlowRates(
        (1e-3, 5e-5),
        "as for LoRA; VeRA's two vectors a module want about ten times that (the paper: 4e-3 to 2e-2)",
    )

    method: Literal["vera"] = "vera"
    rank: int = Field(default=256, gt=0)
    d_initial: float = 0.1
    projection_prng_key: int = Field(default=0, ge=0)
    save_projection: bool = False


class MissSpec(_AdapterSpec, _RankedSpec):
    """MiSS (Kang & Yin, 2024): h = W x + Dᵀ s with s_r = Σₖ x_{r + k rank}: LoRA whose A sums columns of the input."""

    trains_b: ClassVar[bool] = False

    method: Literal["miss"] = "miss"
    rank: int = Field(default=32, gt=0)


class Ia3Spec(_AdapterSpec):
    """IA³ (Liu et al., 2022): each output of a module is multiplied by a trained number; of down_proj, as in the paper,
    each input, which is what the MLP computes between its matrices.
    """

    held_whole: ClassVar[str | None] = "IA³ trains fp32 vectors"
    trains_b: ClassVar[bool] = False
    slow_below: ClassVar[SlowRates | None] = SlowRates(
        (2e-3, 2e-4),
        "as for LoRA; IA³'s vectors, which begin at 1, want several times that (the paper: 3e-3)",
    )

    method: Literal["ia3"] = "ia3"
    target_modules: tuple[LinearModule, ...] = Field(default=("k_proj", "v_proj", "down_proj"), min_length=1)


class RoadSpec(_AdapterSpec):
    """RoAd (Liao & Monz, 2024): pairs of a module's outputs are turned by a trained angle and scaled by a trained
    number. `variant`: one of both for a pair, one for an output (road_2), or one for each of a pair's four products
    (road_4). The two outputs of a pair are half of `group_size` apart.
    """

    held_whole: ClassVar[str | None] = "RoAd trains fp32 vectors"
    trains_b: ClassVar[bool] = False

    method: Literal["road"] = "road"
    variant: RoadVariant = "road_1"
    group_size: int = Field(default=64, ge=2, multiple_of=2)


AdapterSpec = Annotated[
    LoraSpec | DoraSpec | VeraSpec | MissSpec | LongLoraSpec | Ia3Spec | RoadSpec | AloraSpec,
    Field(discriminator="method"),
]
