"""Request bodies of /v1/completions and /v1/chat/completions, and what they mean to the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from loray.errors import RequestError
from loray.spec import SamplingParams

Prompt = str | tuple[int, ...]

MAX_CHOICES = 128  # of one request, all prompts together
MAX_LOGPROBS = 20
_ONLY_THE_BEST = 1e-9  # top_p: the best token alone has more


class _Refusal(NamedTuple):
    """A field that is not implemented: the values that ask for nothing, and what to say of others."""

    harmless: tuple[Any, ...]
    reason: str


_NO_TOOLS = "tool calling is not supported; describe the tools in the messages"
_NO_AUDIO = "only text is generated"
_UNSUPPORTED: Mapping[str, _Refusal] = {
    "tools": _Refusal(([],), _NO_TOOLS),
    "tool_choice": _Refusal(("none", "auto"), _NO_TOOLS),  # without tools they choose nothing
    "functions": _Refusal(([],), _NO_TOOLS),
    "function_call": _Refusal(("none", "auto"), _NO_TOOLS),
    "parallel_tool_calls": _Refusal((True, False), _NO_TOOLS),
    "echo": _Refusal((False,), "the prompt is not echoed; prepend it yourself"),
    "suffix": _Refusal(("",), "insertion is not supported"),
    "logit_bias": _Refusal(({},), "logits cannot be biased"),
    "response_format": _Refusal(({"type": "text"},), 'only {"type": "text"} is; constrained decoding is not supported'),
    "audio": _Refusal((), _NO_AUDIO),
    "modalities": _Refusal((["text"],), _NO_AUDIO),
    "prediction": _Refusal((), "predicted outputs are not supported"),
    "web_search_options": _Refusal((), "there is no web search"),
    "reasoning_effort": _Refusal((), "it means nothing to these models"),
    "verbosity": _Refusal((), "it means nothing to these models"),
    "store": _Refusal((False,), "completions are not stored"),
    "metadata": _Refusal(({},), "completions are not stored"),
    "service_tier": _Refusal(("auto", "default"), "there is one tier"),
    "use_beam_search": _Refusal((False,), "beam search is not supported"),
    "repetition_penalty": _Refusal((1, 1.0), "use presence_penalty or frequency_penalty"),
    "min_tokens": _Refusal((0,), "use ignore_eos with max_tokens"),
    "stop_token_ids": _Refusal(([],), "use stop with strings"),
    "skip_special_tokens": _Refusal((True,), "special tokens are never part of the text"),
    "prompt_logprobs": _Refusal((), "only generated tokens have logprobs"),
}


def _strings(value: object) -> object:
    """`stop`: a string or a list of them."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise RequestError("must be a non-empty string or a list of such strings")
    return tuple(values)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """`prompt`: a string, a list of strings, one list of token ids, or a list of lists of token ids."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return tuple(value)
        if _is_token_ids(value):
            return (tuple(value),)
        if all(isinstance(v, list) and v and _is_token_ids(v) for v in value):
            return tuple(tuple(v) for v in value)
    raise RequestError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_token_ids(values: list[Any]) -> bool:
    return all(type(v) is int and v >= 0 for v in values)


def _text(value: object) -> str:
    """`content`: a string, or text parts, which are joined by newlines."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError("must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(f"content parts of type {kind!r} are not supported; only text is")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise RequestError('a text part is {"type": "text", "text": "..."} and nothing else')
        texts.append(part["text"])
    return "\n".join(texts)


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="accepted; chunks are never padded")
    continuous_usage_stats: bool = False

    @model_validator(mode="after")
    def _usage_at_the_end(self) -> Self:
        if self.continuous_usage_stats:
            raise RequestError("continuous_usage_stats is not supported; include_usage gives usage in the last chunk")
        return self


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, value: Any) -> Any:
        """An assistant's message may come back as it was received, with null and empty fields."""
        if not isinstance(value, dict):
            return value
        for field in ("tool_calls", "function_call", "audio"):
            if value.get(field):
                raise RequestError(f"{field} is not supported: {_NO_TOOLS if field != 'audio' else _NO_AUDIO}")
        empty = ("tool_calls", "annotations")
        return {
            k: v
            for k, v in value.items()
            if v is not None and not (k in empty and v == []) and k != "reasoning_content"  # no template reads it
        }

    def for_template(self) -> dict[str, str]:
        """As chat templates know it; `developer` is OpenAI's newer word for `system`."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name else {})


class GenerationRequest(_Body):
    """What both endpoints share."""

    model: Annotated[str, Field(min_length=1)]
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1, description="0: only the most likely token")
    top_k: int = Field(default=0, ge=-1, description="0 or -1: off")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(default=None, description="n, or nothing")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_strings), Field(max_length=16)] = ()
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="for the caller's own use")
    safety_identifier: str | None = Field(default=None, description="accepted, for the caller's own use")
    prompt_cache_key: str | None = Field(default=None, description="accepted; prompts are not cached between requests")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream: true", "stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise RequestError("best_of is not supported; ask for n choices and choose yourself", "best_of")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    @property
    def asked_max_tokens(self) -> int | None:
        """As given by the caller; None: `default_max_tokens`, as far as the context reaches."""
        raise NotImplementedError

    @property
    def default_max_tokens(self) -> int | None:
        """None: the rest of the context."""
        return None

    def sampling(self, *, max_tokens: int, choice: int) -> SamplingParams:
        """For choice number `choice` of a prompt; where a seed is given, choice i is drawn with seed + i."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p or _ONLY_THE_BEST,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=None if self.seed is None else self.seed + choice,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs,
        )


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], BeforeValidator(_prompts)]
    max_tokens: int | None = Field(default=None, ge=1, description="16 unless given")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise RequestError(
                f"{len(self.prompt)} prompts × n={self.n} are {len(self.prompt) * self.n} choices; "
                f"at most {MAX_CHOICES} in one request",
                "prompt",
            )
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def default_max_tokens(self) -> int:
        return 16


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions. Without a limit, generation may fill the rest of the context."""

    messages: Annotated[tuple[ChatMessage, ...], Field(strict=False)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if not self.messages:
            raise RequestError("messages is empty; give at least one", "messages")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise RequestError("max_tokens and max_completion_tokens differ; give one", "max_tokens")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


R = TypeVar("R", bound=GenerationRequest)


def parse(schema: type[R], body: object) -> R:
    """Check a decoded JSON body. A null field counts as absent. Raises RequestError that names the field."""
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in fields if name in _UNSUPPORTED and name not in schema.model_fields]:
        refusal, value = _UNSUPPORTED[name], fields.pop(name)
        if not any(type(h) is type(value) and h == value for h in refusal.harmless):
            raise RequestError(f"{name} is not supported: {refusal.reason}", name)
    try:
        return schema.model_validate(fields)
    except ValidationError as e:
        raise _request_error(e, schema) from e


def _request_error(error: ValidationError, schema: type[BaseModel]) -> RequestError:
    """All that is wrong in one message; `param` is the first field at fault."""
    lines, params = [], []
    for detail in error.errors(include_url=False):
        param = ".".join(str(part) for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        if detail["type"] == "extra_forbidden":
            known = f"; known fields: {', '.join(sorted(schema.model_fields))}" if len(detail["loc"]) == 1 else ""
            lines.append(f"unknown field {param!r}{known}")
        elif detail["type"] == "missing":
            lines.append(f"{param!r} is required")
        elif isinstance(cause, RequestError):
            lines.append(f"{param}: {cause}" if param else str(cause))
            param = param or cause.param or ""
        else:
            message = detail["msg"]
            lines.append(f"{param}: {message[:1].lower()}{message[1:]}" if param else message)
        params.append(param)
    return RequestError("; ".join(lines), params[0] or None)
