"""What is trained on, token by token: data with its targets, losses over log-probabilities, optimizer steps.

The names are those of Tinker's API. All arrays are numpy's, so that whoever sends them needs no torch.

Shapes: T positions of a datum, each with a target of its own: nothing is shifted.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from loray.errors import IntegrityError, RequestError
from loray.spec.fields import Frozen

LossType = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "gspo", "dro"]
Array = NDArray[Any]
T = TypeVar("T")

_DTYPES = {"token_ids": "<i4", "target_ids": "<i8"}  # of the others "<f4"


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """One row: what the model reads, and of each position (T,) what the loss needs to know.

    token_ids            int32, the model's input
    target_ids           int64, the token whose log-probability a position has
    weights              factors of the loss, of any sign; 0: no answer's; None: 1
    logprobs             of the targets, by the model that sampled them
    advantages           of the targets
    mask                 which positions GSPO's mean over a sequence counts; None: those with an advantage
    clip_low, clip_high  bounds of the ratio for this position, in place of the loss's
    values               log-probabilities to take as the model's own, whose gradient stays; None: the model's

    Raises RequestError where an array has another length, is no array of numbers, or there is no position.
    """

    token_ids: Array
    target_ids: Array
    weights: Array | None = None
    logprobs: Array | None = None
    advantages: Array | None = None
    mask: Array | None = None
    clip_low: Array | None = None
    clip_high: Array | None = None
    values: Array | None = None

    def __post_init__(self) -> None:
        for name in FIELDS:
            value = getattr(self, name)
            if value is None:
                continue
            try:
                array = np.ascontiguousarray(value, dtype=_DTYPES.get(name, "<f4"))
            except (TypeError, ValueError, OverflowError) as e:
                raise RequestError(f"{name} of a datum is no array of numbers: {e}", name) from e
            object.__setattr__(self, name, array)
            if array.ndim != 1 or array.shape != self.token_ids.shape or not len(array):
                shapes = f"{list(array.shape)}, and token_ids {list(np.shape(self.token_ids))}"
                raise RequestError(f"{name} of a datum has the shape {shapes}; give one number for each token", name)

    def __len__(self) -> int:
        """Count the positions."""
        return len(self.token_ids)


FIELDS = tuple(f.name for f in fields(Datum))
_OPTIONS: Mapping[str, Mapping[str, float]] = {
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low": 0.8, "clip_high": 1.2},
    "cispo": {"clip_low": 0.0, "clip_high": 4.0},
    "gspo": {"clip_low": 0.8, "clip_high": 1.2},
    "dro": {},
}
_FURTHER = {"importance_sampling": ("ratio_cap",), "dro": ("beta",)}  # options without a default


class TokenLoss(Frozen):
    """A loss over the log-probabilities of targets (`loray.train.rl.losses` has the formulas).

    clip_low, clip_high  bounds of the ratio between trained and sampled probability: ppo, cispo, gspo
    ratio_cap            the largest ratio that counts: importance_sampling; None: any
    beta                 weight of the squared difference: dro, which needs it
    divisor              of the sum over positions
    kl                   weight of the divergence from the base (k3), which takes one more forward pass
    """

    type: LossType = "cross_entropy"
    clip_low: float | None = Field(default=None, ge=0)
    clip_high: float | None = Field(default=None, ge=0)
    ratio_cap: float | None = Field(default=None, gt=0)
    beta: float | None = Field(default=None, ge=0)
    divisor: float = Field(default=1.0, gt=0)
    kl: float = Field(default=0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        kind = given.get("type", "cross_entropy")
        return {**(_OPTIONS.get(kind, {}) if isinstance(kind, str) else {}), **given}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        known = (*_OPTIONS[self.type], *_FURTHER.get(self.type, ()))
        for name in ("clip_low", "clip_high", "ratio_cap", "beta"):
            if getattr(self, name) is not None and name not in known:
                raise ValueError(f"{self.type} has no {name}; it has {', '.join(known) or 'no option'}")
        if self.clip_low is not None and self.clip_high is not None and self.clip_low > self.clip_high:
            raise ValueError(f"clip_low {self.clip_low} is above clip_high {self.clip_high}")
        if self.type == "dro" and self.beta is None:
            raise ValueError("dro needs a beta, for which nobody has published a default")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class ForwardBackward:
    """Adds the gradients of a loss over some data to those of a model, or computes the loss alone.

    Raises RequestError where there is no datum, or one lacks what its loss needs.
    """

    model: str
    datums: tuple[Datum, ...]
    loss: TokenLoss = field(default_factory=TokenLoss)
    forward_only: bool = False

    def __post_init__(self) -> None:
        if not self.datums:
            raise RequestError("there is no datum to compute a loss of; give one at least", "data")
        needs = () if self.loss.type == "cross_entropy" else ("logprobs", "advantages")
        for i, datum in enumerate(self.datums):
            if missing := [name for name in needs if getattr(datum, name) is None]:
                raise RequestError(f"datum {i} has no {' and no '.join(missing)}, which {self.loss.type} needs", "data")

    @property
    def num_tokens(self) -> int:
        """Count the positions of all data."""
        return sum(map(len, self.datums))


class AdamParams(Frozen):
    """One step of AdamW: its learning rate, and what Tinker calls its other parameters. `grad_clip_norm` 0: gradients
    are not clipped.
    """

    learning_rate: float = Field(default=1e-4, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-12, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip_norm: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, slots=True)
class OptimStep:
    """Updates a model by the gradients that have been added up, which are 0 afterwards."""

    model: str
    adam: AdamParams = field(default_factory=AdamParams)


@dataclass(frozen=True, slots=True)
class SaveState:
    """Saves a model's weights and optimizer state under a name of its own."""

    model: str
    name: str


@dataclass(frozen=True, slots=True)
class LoadState:
    """Takes the weights in a folder that SaveState has made, and the optimizer's state where that is asked for."""

    model: str
    path: str
    with_optimizer: bool


@dataclass(frozen=True, slots=True)
class Publish:
    """Makes an ephemeral adapter of a model's weights."""

    model: str


Op = ForwardBackward | OptimStep | SaveState | LoadState | Publish


@dataclass(frozen=True, slots=True, eq=False)
class LossOutput:
    """What a ForwardBackward computes.

    logprobs  of the targets of every position of each datum, also of weight 0, fp32
    loss      the sum over positions, by the loss's divisor
    metrics   sums over positions, and means, by their names
    """

    logprobs: tuple[Array, ...]
    loss: float
    metrics: Mapping[str, float]


# -- as bytes: a length, a JSON object, then the arrays' bytes; all of it compressed -----------------------------------

_LENGTH = struct.Struct("<I")


_PLAIN: Mapping[str, type[SaveState | LoadState | Publish]] = {
    kind.__name__: kind for kind in (SaveState, LoadState, Publish)
}


def op_to_bytes(op: Op) -> bytes:
    """Write an operation. Equal ones have equal bytes."""
    head: dict[str, Any] = {"kind": type(op).__name__, "model": op.model}
    if isinstance(op, ForwardBackward):
        head |= {"loss": op.loss.model_dump(), "forward_only": op.forward_only}
        return _pack(head, {name: [getattr(datum, name) for datum in op.datums] for name in FIELDS})
    return _pack(head | ({"adam": op.adam.model_dump()} if isinstance(op, OptimStep) else asdict(op)), {})


def op_from_bytes(data: bytes) -> Op:
    """Read what `op_to_bytes` wrote. Raises IntegrityError."""

    def read(head: dict[str, Any], arrays: Mapping[str, list[Array | None]]) -> Op:
        kind = head.pop("kind")
        if kind in _PLAIN:
            return _PLAIN[kind](**head)
        if kind == OptimStep.__name__:
            return OptimStep(head["model"], AdamParams(**head["adam"]))
        rows = zip(*(arrays[name] for name in FIELDS), strict=True)
        datums = tuple(Datum(*cast(Any, row)) for row in rows)
        return ForwardBackward(head["model"], datums, TokenLoss(**head["loss"]), head["forward_only"])

    return _unpacked(data, read)


def output_to_bytes(output: LossOutput) -> bytes:
    """Write what was computed, with all its bits."""
    return _pack({"loss": output.loss, "metrics": dict(output.metrics)}, {"logprobs": output.logprobs})


def output_from_bytes(data: bytes) -> LossOutput:
    """Read what `output_to_bytes` wrote. Raises IntegrityError."""
    return _unpacked(
        data, lambda head, arrays: LossOutput(tuple(cast(Any, arrays["logprobs"])), head["loss"], head["metrics"])
    )


def _pack(head: Mapping[str, Any], columns: Mapping[str, Sequence[Array | None]]) -> bytes:
    described, parts = {}, []
    for name, column in columns.items():
        found = [array for array in column if array is not None]
        lengths = [-1 if array is None else len(array) for array in column]
        described[name] = [found[0].dtype.str if found else "<f4", lengths]
        parts += [array.tobytes() for array in found]
    header = json.dumps({"head": head, "columns": described}).encode()
    return zlib.compress(b"".join([_LENGTH.pack(len(header)), header, *parts]), 1)


def _unpacked(data: bytes, read: Callable[[dict[str, Any], Mapping[str, list[Array | None]]], T]) -> T:
    try:
        raw = zlib.decompress(data)
        (length,) = _LENGTH.unpack_from(raw)
        header = json.loads(raw[4 : 4 + length])
        at = 4 + length

        def arrays(dtype: str, lengths: Sequence[int]) -> Iterator[Array | None]:
            nonlocal at
            for n in lengths:
                yield None if n < 0 else np.frombuffer(raw, dtype, n, at)
                at += max(n, 0) * np.dtype(dtype).itemsize

        return read(header["head"], {name: list(arrays(*column)) for name, column in header["columns"].items()})
    except (zlib.error, struct.error, ValueError, KeyError, TypeError, RequestError) as e:
        raise IntegrityError(f"an operation or its result cannot be read: {e}") from e
