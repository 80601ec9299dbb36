"""Requests of Tinker's protocol: JSON bodies, and what a protobuf body of `forward_backward` means.

An unknown field of a JSON body is refused by its name. Field names are the protocol's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, StrictBool, StringConstraints, ValidationError, field_validator, model_validator

from loray.errors import RequestError, UnsupportedParameter, shown
from loray.schemas.tinker.paths import check_checkpoint_name
from loray.schemas.tinker.proto import ForwardBackwardRequest, decompress, parse
from loray.schemas.tinker.tensors import read_tensor, read_tokens
from loray.spec.datums import AdamParams, Datum, TokenLoss
from loray.spec.fields import Frozen, mistakes
from loray.spec.generation import SamplingParams
from loray.spec.methods import ATTENTION_MODULES, MLP_MODULES, LinearModule

MAX_DATUMS, MAX_SAMPLES, MAX_RANK = 4096, 128, 256
MIN_TTL_S, MAX_TTL_S = 3600, 10 * 365 * 86400
_MOST_METADATA = 64
_LOSSES = ("cross_entropy", "importance_sampling", "ppo", "cispo", "gspo", "dro")
_OF_POLICY = frozenset({"target_tokens", "logprobs", "advantages"})
_CLIPS = frozenset({"clip_low_threshold", "clip_high_threshold"})
# What a datum must have, and may have, for each loss.
_INPUTS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "cross_entropy": (frozenset({"target_tokens"}), frozenset({"weights"})),
    "importance_sampling": (_OF_POLICY, frozenset()),
    "ppo": (_OF_POLICY, _CLIPS),
    "cispo": (_OF_POLICY, _CLIPS),
    "gspo": (_OF_POLICY, _CLIPS | {"sequence_ratio_mask"}),
    "dro": (_OF_POLICY, frozenset()),
}
_CONFIG: Mapping[str, Mapping[str, str]] = {  # keys of loss_fn_config, as fields of TokenLoss
    "ppo": {"clip_low_threshold": "clip_low", "clip_high_threshold": "clip_high"},
    "cispo": {"clip_low_threshold": "clip_low", "clip_high_threshold": "clip_high"},
    "gspo": {"clip_low_threshold": "clip_low", "clip_high_threshold": "clip_high"},
    "dro": {"beta": "beta"},
}

Metadata = Annotated[dict[str, Any], Field(max_length=_MOST_METADATA)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Seq = Annotated[int, Field(ge=1, lt=1 << 31)]
Number = Annotated[int, Field(ge=0, lt=1_000_000_000)]
Ttl = Annotated[int, Field(ge=MIN_TTL_S, le=MAX_TTL_S)]


class TinkerRequest(Frozen):
    """A JSON body. `type` is a constant of each request, which says nothing."""

    type: str | None = None

    @classmethod
    def read(cls, raw: bytes) -> Self:
        """Raises RequestError, which names the first wrong field."""
        try:
            return cls.model_validate_json(raw or b"{}")
        except ValidationError as e:
            first = mistakes(e)[0]
            param = ".".join(map(str, first["loc"])) or None
            told = "this server does not know this field" if first["type"] == "extra_forbidden" else first["msg"]
            raise RequestError(f"{param or 'the body'}: {told}", param) from e


def as_texts(metadata: Mapping[str, Any] | None) -> dict[str, str]:
    """Metadata with texts alone, which is how the protocol gives it back."""
    return {key: value if isinstance(value, str) else str(value) for key, value in (metadata or {}).items()}


class ClientConfigRequest(TinkerRequest):
    model_config = ConfigDict(extra="ignore")

    sdk_version: str = Field(max_length=64)


class CreateSessionRequest(TinkerRequest):
    tags: list[str] = Field(default_factory=list, max_length=_MOST_METADATA)
    user_metadata: Metadata | None = None
    sdk_version: str = Field(max_length=64)
    project_id: str | None = Field(default=None, max_length=128)
    display_name: str | None = Field(default=None, max_length=256)


class SessionRequest(TinkerRequest):
    session_id: Id


class FinishReason(Frozen):
    type: Literal["success", "errored", "interrupted"]


class FinishSessionRequest(TinkerRequest):
    reason: FinishReason
    detail: str | None = Field(default=None, max_length=4096)


class LoraConfig(Frozen):
    """`train_unembed` is accepted and not done: the head of a base is frozen here."""

    rank: int = Field(ge=1, le=MAX_RANK)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    train_unembed: StrictBool = True
    train_mlp: StrictBool = True
    train_attn: StrictBool = True

    @property
    def target_modules(self) -> tuple[LinearModule, ...]:
        """Raises UnsupportedParameter where only the head would be trained."""
        modules = (*(ATTENTION_MODULES if self.train_attn else ()), *(MLP_MODULES if self.train_mlp else ()))
        if not modules:
            raise UnsupportedParameter(
                "train_unembed alone: loray's head is frozen; set train_attn or train_mlp", "lora_config"
            )
        return modules


class OptimizerConfig(Frozen):
    model_config = ConfigDict(extra="allow")

    type: str = "adamw"

    @field_validator("type")
    @classmethod
    def _is_adamw(cls, value: str) -> str:
        if value != "adamw":
            raise ValueError(f"the optimizer {shown(value)} is not supported; use adamw")
        return value


class CreateModelRequest(TinkerRequest):
    session_id: Id
    model_seq_id: Number
    base_model: str = Field(min_length=1, max_length=256)
    user_metadata: Metadata | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: OptimizerConfig = OptimizerConfig()


class LoadWeightsRequest(TinkerRequest):
    """Weights for a model that is there (`model_id`, `seq_id`), or for a new one (`session_id`, `model_seq_id`)."""

    model_id: Id | None = None
    seq_id: Seq | None = None
    session_id: Id | None = None
    model_seq_id: Number | None = None
    base_model: str | None = Field(default=None, max_length=256)
    user_metadata: Metadata | None = None
    path: str = Field(max_length=512)
    optimizer: StrictBool
    optimizer_config: OptimizerConfig | None = None
    weights_access_token: str | None = None

    @model_validator(mode="after")
    def _one_address(self) -> Self:
        known, new = (self.model_id, self.seq_id), (self.session_id, self.model_seq_id)
        if (None in known) == (None in new) or any(part is not None for part in (known if None in known else new)):
            raise ValueError("give either model_id and seq_id, or session_id and model_seq_id")
        if self.weights_access_token is not None:
            raise ValueError("weights_access_token is not supported: weights of another tenant are not loaded")
        return self


class ModelRequest(TinkerRequest):
    model_id: Id


class SequencedRequest(TinkerRequest):
    model_id: Id
    seq_id: Seq


class OptimStepRequest(SequencedRequest):
    adam_params: AdamParams
    optimizer_params: OptimizerConfig | None = None


class SaveWeightsRequest(SequencedRequest):
    path: str | None = None
    ttl_seconds: Ttl | None = None
    overwrite: StrictBool = False
    user_metadata: Metadata | None = None

    @property
    def name(self) -> str:
        """Raises RequestError."""
        return f"step-{self.seq_id:06d}" if self.path is None else check_checkpoint_name(self.path)


class SaveWeightsForSamplerRequest(SequencedRequest):
    """With `path`, the weights are published; with `sampling_session_seq_id`, a sampling session has them alone."""

    path: str | None = None
    sampling_session_seq_id: Number | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise ValueError("give either path or sampling_session_seq_id")
        return self


class WeightsInfoRequest(TinkerRequest):
    tinker_path: str = Field(max_length=512)


class TtlRequest(TinkerRequest):
    ttl_seconds: Ttl | None = None


class RequestIdRequest(TinkerRequest):
    request_id: str = Field(max_length=160)
    allow_metadata_only: bool = False
    model_id: str | None = None


class CreateSamplingSessionRequest(TinkerRequest):
    session_id: Id
    sampling_session_seq_id: Number
    base_model: str | None = Field(default=None, max_length=256)
    model_path: str | None = Field(default=None, max_length=512)

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if self.base_model is None and self.model_path is None:
            raise ValueError("give base_model or model_path")
        return self


class SamplerRequest(TinkerRequest):
    sampling_session_id: Id


class EncodedText(Frozen):
    type: Literal["encoded_text"] = "encoded_text"
    tokens: tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...]


class ModelInput(Frozen):
    chunks: tuple[EncodedText, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(token for chunk in self.chunks for token in chunk.tokens)


class SampleParams(Frozen):
    max_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    stop: str | tuple[str, ...] | tuple[int, ...] | None = None
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_k: int = Field(default=-1, ge=-1)
    top_p: float = Field(default=1.0, gt=0, le=1)


class SampleRequest(TinkerRequest):
    num_samples: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    prompt: ModelInput
    sampling_params: SampleParams = SampleParams()
    base_model: str | None = None
    model_path: str | None = None
    sampling_session_id: Id
    seq_id: int = Field(ge=0, lt=1 << 63)
    prompt_logprobs: StrictBool | None = None
    topk_prompt_logprobs: int = Field(default=0, ge=0, le=20)
    topk_sample_logprobs: int = Field(default=0, ge=0, le=20)
    target_prompt_logprobs: None = Field(default=None)
    prompt_alt_tokens_k: Literal[0] = 0
    prompt_logprobs_last_n: int | None = Field(default=None, ge=1)
    record_stability_info: StrictBool | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        num_tokens = len(self.prompt.token_ids)
        if not num_tokens:
            raise ValueError("the prompt has no tokens; give at least one")
        last = self.prompt_logprobs_last_n
        if last is not None and (not self.prompt_logprobs or last >= num_tokens):
            raise ValueError("prompt_logprobs_last_n needs prompt_logprobs, and is less than the prompt's tokens")
        return self

    def params(self, context_length: int) -> SamplingParams:
        """As the engine has them. `max_tokens` null: what is left of the context. Raises RequestError."""
        asked, prompt = self.sampling_params, len(self.prompt.token_ids)
        stop = (asked.stop,) if isinstance(asked.stop, str) else asked.stop
        texts = tuple(part for part in stop or () if isinstance(part, str))
        scores = bool(self.prompt_logprobs or self.topk_prompt_logprobs)
        try:
            return SamplingParams(
                max_tokens=max(1, context_length - prompt) if asked.max_tokens is None else asked.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=max(0, asked.top_k),
                seed=asked.seed,
                stop=texts,
                stop_token_ids=tuple(part for part in stop or () if isinstance(part, int)),
                include_stop_str_in_output=bool(texts),
                ignore_eos=stop == (),
                logprobs=self.topk_sample_logprobs,
                prompt_logprobs=self.topk_prompt_logprobs if scores else None,
            )
        except ValidationError as e:
            first = mistakes(e)[0]
            param = ".".join(map(str, ("sampling_params", *first["loc"])))
            raise RequestError(f"{param}: {first['msg']}", param) from e


# -- forward_backward --


class ForwardBackwardBody(NamedTuple):
    """What a protobuf body asks for."""

    model_id: str
    seq_id: int
    datums: tuple[Datum, ...]
    loss: TokenLoss
    forward_only: bool

    def check(self, vocab_size: int, context_length: int) -> None:
        """Raise RequestError for a token outside of the vocabulary, or a row longer than the context."""
        for i, datum in enumerate(self.datums):
            if len(datum) > context_length:
                raise RequestError(f"data.{i} has {len(datum)} tokens; the context has {context_length}", f"data.{i}")
            for name, ids in (("model_input", datum.token_ids), ("target_tokens", datum.target_ids)):
                if ids.min() < 0 or ids.max() >= vocab_size:
                    raise RequestError(f"data.{i}.{name}: a token is outside of the {vocab_size:,} known", f"data.{i}")


def read_forward_backward(raw: bytes, encoding: str = "identity") -> ForwardBackwardBody:
    """Raises RequestError, which names the datum and its input. `encoding`: the header Content-Encoding."""
    message = parse(ForwardBackwardRequest, decompress(raw, encoding))
    if not message.model_id or message.seq_id < 1:
        raise RequestError("model_id and seq_id (from 1 on) are needed", "seq_id")
    if not 0 < len(message.data) <= MAX_DATUMS:
        raise RequestError(f"{len(message.data)} datums; give 1 to {MAX_DATUMS:,} in one request", "data")
    loss = _loss(message)
    datums = tuple(_datum(datum, loss.type, f"data.{i}") for i, datum in enumerate(message.data))
    return ForwardBackwardBody(message.model_id, message.seq_id, datums, loss, message.forward_only)


def _loss(message: Any) -> TokenLoss:
    name = message.loss_fn
    if name not in _LOSSES:
        instead = "StableReinforce is not published as a formula; " if name == "stable_reinforce" else ""
        raise UnsupportedParameter(f"loss_fn {shown(name)}: {instead}use one of {', '.join(_LOSSES)}", "loss_fn")
    given: dict[str, float | str] = dict(message.loss_fn_config)
    for key, value in message.loss_fn_config_v2.items():
        given[key] = value.text if value.WhichOneof("value") == "text" else value.number
    fields, known = {}, _CONFIG.get(name, {})
    for key, value in given.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise RequestError(f"loss_fn_config.{key}: {name} has no such setting; it has {allowed}", "loss_fn_config")
        if not isinstance(value, float) or not math.isfinite(value):
            raise RequestError(f"loss_fn_config.{key} must be a number", "loss_fn_config")
        fields[known[key]] = value
    try:
        return TokenLoss(type=name, **fields)
    except ValidationError as e:
        raise RequestError(f"loss_fn_config: {mistakes(e)[0]['msg']}", "loss_fn_config") from e


def _datum(message: Any, loss: str, where: str) -> Datum:
    token_ids = read_tokens(message.model_input, f"{where}.model_input")
    if not token_ids.size:
        raise RequestError(f"{where}.model_input has no tokens; give at least one", where)
    needed, more = _INPUTS[loss]
    if missing := sorted(needed - message.loss_fn_inputs.keys()):
        raise RequestError(f"{where}.loss_fn_inputs: {loss} needs {', '.join(missing)}", where)
    if unknown := sorted(message.loss_fn_inputs.keys() - needed - more):
        allowed = ", ".join(sorted(needed | more))
        raise RequestError(f"{where}.loss_fn_inputs: {loss} has no {', '.join(unknown)}; it has {allowed}", where)
    inputs = {
        name: _of_positions(read_tensor(tensor, f"{where}.loss_fn_inputs.{name}"), token_ids.size, name, where)
        for name, tensor in message.loss_fn_inputs.items()
    }
    return Datum(
        token_ids=token_ids,
        target_ids=inputs["target_tokens"],
        weights=inputs.get("weights"),
        logprobs=inputs.get("logprobs"),
        advantages=inputs.get("advantages"),
        mask=inputs.get("sequence_ratio_mask"),
        clip_low=inputs.get("clip_low_threshold"),
        clip_high=inputs.get("clip_high_threshold"),
    )


def _of_positions(values: npt.NDArray[Any], length: int, name: str, where: str) -> npt.NDArray[Any]:
    """Return the values of the datum's positions, (T,): int64 targets, or finite float32."""
    at = f"{where}.loss_fn_inputs.{name}"
    if values.ndim == 2 and values.shape[1] > 1:
        raise UnsupportedParameter(f"{at} has {values.shape[1]} columns; one target a position is supported", at)
    flat = values.reshape(-1)
    if flat.size != length:
        raise RequestError(f"{at} has {flat.size} values, and model_input has {length} tokens", at)
    if name == "target_tokens":
        if flat.dtype.kind != "i":
            raise RequestError(f"{at} must be int64, not {flat.dtype}", at)
        return flat.astype(np.int64, copy=False)
    numbers = flat.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise RequestError(f"{at} has values that are not finite", at)
    return numbers
