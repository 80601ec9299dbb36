"""The ground of OpenAI's bodies: strict models, and fields that are refused, unknown, or have several forms."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from loray.errors import RequestError, UnknownParameter, UnsupportedParameter, shown

# -- refused fields ---------------------------------------------------------------------------------------------------


class _Refusal(NamedTuple):
    """A field that is not implemented: its values without effect, and the reason for refusing any other."""

    harmless: tuple[Any, ...]
    reason: str


NO_TOOLS = "only chat completions have tools"
NO_FUNCTIONS = "it is OpenAI's older form; use tools and tool_calls"
NO_AUDIO = "only text is generated"
_UNSUPPORTED: Mapping[str, _Refusal] = {
    "tools": _Refusal(([],), NO_TOOLS),
    "tool_choice": _Refusal(("none", "auto"), NO_TOOLS),  # without tools they have no effect
    "functions": _Refusal(([],), NO_FUNCTIONS),
    "function_call": _Refusal(("none", "auto"), NO_FUNCTIONS),
    "parallel_tool_calls": _Refusal((True, False), NO_TOOLS),
    "chat_template": _Refusal((), "a model, or an adapter, has its own"),
    "documents": _Refusal(([],), "put them into the messages"),
    "echo": _Refusal((False,), "only completions echo their prompt"),
    "suffix": _Refusal(("",), "insertion is not supported"),
    "audio": _Refusal((), NO_AUDIO),
    "modalities": _Refusal((["text"],), NO_AUDIO),
    "prediction": _Refusal((), "predicted outputs are not supported"),
    "web_search_options": _Refusal((), "there is no web search"),
    "use_beam_search": _Refusal((False,), "beam search is not supported"),
    "spaces_between_special_tokens": _Refusal((True,), "special tokens are written as the tokenizer writes them"),
    "logits_processors": _Refusal(([],), "no code of callers is run"),
    "length_penalty": _Refusal((1, 1.0), "beam search is not supported"),
}
UNSUPPORTED = frozenset(_UNSUPPORTED)


def without_unsupported(given: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Removes unsupported fields whose values have no effect; `known` fields stay. RequestError names any other."""
    out = dict(given)
    for name in [name for name in given if name in _UNSUPPORTED and name not in known]:
        refusal, value = _UNSUPPORTED[name], out.pop(name)
        if not any(type(h) is type(value) and h == value for h in refusal.harmless):
            raise UnsupportedParameter(f"{name} is not supported: {refusal.reason}", name)
    return out


# -- unknown fields ---------------------------------------------------------------------------------------------------

_MAX_UNKNOWN = 64  # names of one body
NAME = re.compile(r"[A-Za-z0-9_.$-]{1,64}")  # of a field that headers and metrics may name
OTHER = "other"  # stands for names that no header can have
_SHORT_NAME = 5  # characters, below which one edit makes another word


class UnknownFields:
    """Decides what becomes of fields that nobody knows, which newer clients send: they are ignored, unless they are
    most likely typing errors, or `refuse` is set.

    ignored  the names, each once, in the order in which they came
    near     name → the known field of its object that was most likely meant
    """

    def __init__(self, *, refuse: bool = False) -> None:
        self._refuse = refuse
        self._seen: set[str] = set()
        self.ignored: dict[str, None] = {}
        self.near: dict[str, str] = {}

    def without(self, given: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
        """Return the object without the fields that are ignored, and without unknown ones that are null. RequestError
        where it has too many.
        """
        return {
            name: value
            for name, value in given.items()
            if name in known or (value is not None and self._is_refused(name, known))
        }

    def _is_refused(self, name: str, known: frozenset[str]) -> bool:
        if name in self.near:  # found in a body of which this one is another form
            return True
        self._seen.add(name)
        if len(self._seen) > _MAX_UNKNOWN:
            if self._refuse:
                return True
            raise UnknownParameter(f"more than {_MAX_UNKNOWN} unknown fields; send known ones alone")
        if (near := _nearest(name, known)) is not None:
            self.near[name] = near
        elif not self._refuse:
            self.ignored[name if NAME.fullmatch(name) else OTHER] = None
        return self._refuse or near is not None


@lru_cache(maxsize=1024)
def _nearest(name: str, known: frozenset[str]) -> str | None:
    """Find the known name within two edits, within one of a short name. The first one of several."""
    if not NAME.fullmatch(name):
        return None
    most = 1 if len(name) < _SHORT_NAME else 2
    return min((word for word in known if _is_within(name, word, most)), default=None)


def _is_within(a: str, b: str, most: int) -> bool:
    """Tell whether `most` edits make `b` of `a`: a character more, less, another one, or two that change places."""
    if abs(len(a) - len(b)) > most:
        return False
    while a and b and a[0] == b[0]:
        a, b = a[1:], b[1:]
    if not most or not a or not b:
        return len(a) + len(b) <= most
    less = most - 1
    swapped = a[:2] == b[1::-1] and _is_within(a[2:], b[2:], less)
    return swapped or _is_within(a[1:], b[1:], less) or _is_within(a[1:], b, less) or _is_within(a, b[1:], less)


_unknown: ContextVar[UnknownFields | None] = ContextVar("unknown_fields", default=None)


@contextmanager
def reading(unknown: UnknownFields) -> Iterator[UnknownFields]:
    """Let `unknown` decide in the block, for all that `parse` reads there."""
    token = _unknown.set(unknown)
    try:
        yield unknown
    finally:
        _unknown.reset(token)


# -- fields of several forms ------------------------------------------------------------------------------------------

MAX_CHOICES = 128  # of one request, all prompts together
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256  # of each, also of bad words
MAX_STOP_TOKENS = 128
MAX_BAD_WORDS = 128
MAX_BIASES = 1024
MAX_SHORT_CHARACTERS = 512  # of a name, and of what is one word
MAX_DESCRIPTION = 16 << 10  # characters of what a tool or a schema is for
MAX_OBJECT_CHARACTERS = 16 << 10  # of an object that may have any members
Prompt = str | tuple[int, ...]
PromptForms = str | list[str] | list[int] | list[list[int]]
ShortText = Annotated[str, Field(max_length=MAX_SHORT_CHARACTERS)]


def num_characters(value: object) -> int:
    """Characters of all strings in a JSON value, keys too. Any other value counts as one or more, a number as about its
    digits.
    """
    num, rest = 0, [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            num += len(part)
            continue
        num += 1
        if isinstance(part, dict):
            num += sum(map(len, part))
            rest += part.values()
        elif isinstance(part, list | tuple):
            rest += part
        elif isinstance(part, int):
            num += part.bit_length() // 3
    return num


def _small(value: dict[str, Any]) -> dict[str, Any]:
    if (num := num_characters(value)) > MAX_OBJECT_CHARACTERS:
        raise RequestError(f"has {num:,} characters; at most {MAX_OBJECT_CHARACTERS:,} are allowed")
    return value


SmallObject = Annotated[dict[str, Any], AfterValidator(_small)]


def stop_strings(value: object) -> object:
    """`stop`: a string or a list of them."""
    return _short(_strings(value, MAX_STOP_STRINGS))


def bad_words(value: object) -> object:
    return _short(_strings(value, MAX_BAD_WORDS))


def _short(values: tuple[str, ...]) -> tuple[str, ...]:
    if any(len(v) > MAX_STOP_CHARACTERS for v in values):
        raise RequestError(f"each string may have {MAX_STOP_CHARACTERS:,} characters at most")
    return values


def _strings(value: object, limit: int) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list):
        _check_number(values, limit, "strings")
    if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
        raise RequestError("must be a non-empty string or a list of such strings")
    return tuple(values)


def stop_tokens(value: object) -> object:
    if isinstance(value, list):
        _check_number(value, MAX_STOP_TOKENS, "token ids")
    return token_ids(value)


def token_ids(value: object) -> object:
    if not isinstance(value, list) or not _is_token_ids(value):
        raise RequestError("must be a list of token ids")
    return tuple(value)


def bias(value: object) -> object:
    """`logit_bias`: an object from token ids to numbers. Keys of JSON objects are strings."""
    if isinstance(value, dict):
        _check_number(value, MAX_BIASES, "entries")
    try:
        biases = {int(token): added for token, added in value.items()}  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        biases = {-1: 0}
    if not _is_token_ids(list(biases)):
        raise RequestError("must be an object from token ids to numbers")
    return biases


def prompts(value: object, most: int = MAX_CHOICES) -> tuple[Prompt, ...]:
    """`prompt`: a string, a list of strings, one list of token ids, or a list of lists of token ids. Any may be empty;
    `most`: of a list of prompts.
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return (tuple(value),)
        if isinstance(value[0], str | list):
            _check_number(value, most, "prompts")
        if all(isinstance(v, str) for v in value):
            return tuple(value)
        if all(isinstance(v, list) and _is_token_ids(v) for v in value):
            return tuple(tuple(v) for v in value)
    raise RequestError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")


def _is_token_ids(values: list[Any]) -> bool:
    """All are token ids, as no loop in Python finds: a prompt may have hundreds of thousands. A bool is no id."""
    return set(map(type, values)) <= {int} and min(values, default=0) >= 0 and max(values, default=0) < 1 << 31


def _check_number(values: Sized, limit: int, noun: str) -> None:
    if len(values) > limit:
        raise RequestError(f"has {len(values):,} {noun}; at most {limit:,} are allowed")


def text(value: object) -> str:
    """`content`: a string, or a list of text parts, which are joined by newlines. A part's further keys are hints."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RequestError("must be a string or a list of text parts")
    return "\n".join(map(_part, value))


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal"):
        raise RequestError(f"content parts of type {shown(kind)} are not supported; only text is")
    found = part.get(kind) if isinstance(part, dict) else None
    if not isinstance(found, str):
        raise RequestError('a text part is {"type": "text", "text": "..."}')
    return found


# -- bodies -----------------------------------------------------------------------------------------------------------

_MAX_MISTAKES = 8  # that one message names
_HINT = "accepted; it changes nothing"


class Body(BaseModel):
    """A body that a client sends, or an object in one, which has no values of other types. Of unknown fields it has
    none: they are refused, but for those that an `UnknownFields` ignores.

    known       the names of its fields
    also_known  further ones, of which an unknown field may be a typing error
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        json_schema_extra=lambda schema: schema.pop("additionalProperties", None),  # some are ignored
    )
    known: ClassVar[frozenset[str]]
    also_known: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        names = (field.alias or name for name, field in cls.model_fields.items())
        cls.known = frozenset(names) | cls.also_known

    @model_validator(mode="before")
    @classmethod
    def _without_unknown(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.keys() <= cls.known and (unknown := _unknown.get()) is not None:
            return unknown.without(value, cls.known)
        return value


class Hints(Body):
    """Fields that clients send for OpenAI's accounting and for other kinds of models."""

    metadata: SmallObject | None = Field(default=None, description="accepted; nothing is stored")
    store: bool | None = Field(default=None, description="accepted; nothing is stored")
    reasoning_effort: ShortText | None = Field(default=None, description="of chats: how long a reasoning model thinks")
    include_reasoning: bool | None = Field(default=None, description="of chats; false: answers leave it out")
    verbosity: ShortText | None = Field(default=None, description=_HINT)
    service_tier: ShortText | None = Field(default=None, description=_HINT)
    safety_identifier: ShortText | None = Field(default=None, description="accepted, for the caller's own use")
    prompt_cache_key: ShortText | None = Field(default=None, description="accepted; the prefix cache needs no key")
    prompt_cache_retention: ShortText | None = Field(default=None, description=_HINT)


B = TypeVar("B", bound=Body)


def parse(schema: type[B], body: object) -> B:
    """Checks a decoded JSON body. A null field counts as absent. Unknown ones are refused, unless a block of `reading`
    ignores them. Raises RequestError that names the field.
    """
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    given = without_unsupported(given, schema.model_fields)
    with reading(_unknown.get() or UnknownFields(refuse=True)) as unknown:
        try:
            return schema.model_validate(given)
        except ValidationError as e:
            raise _request_error(e, schema, unknown.near) from e


def _request_error(error: ValidationError, schema: type[BaseModel], near: Mapping[str, str]) -> RequestError:
    """The mistakes in one message; class and `param` are of the first one."""
    lines, params, kinds = [], [], list[type[RequestError]]()
    for detail in error.errors(include_url=False, include_input=False)[:_MAX_MISTAKES]:
        param = ".".join(str(part)[:80] for part in detail["loc"])
        cause = detail.get("ctx", {}).get("error")
        kinds.append(type(cause) if isinstance(cause, RequestError) else RequestError)
        if detail["type"] == "extra_forbidden":
            kinds[-1] = UnknownParameter
            if (meant := near.get(str(detail["loc"][-1]))) is not None:
                hint = f"; did you mean {meant!r}?"
            else:
                known = len(detail["loc"]) == 1
                hint = f"; known fields: {', '.join(sorted(schema.model_fields))}" if known else ""
            lines.append(f"unknown field {shown(param)}{hint}")
        elif detail["type"] == "missing":
            lines.append(f"{param!r} is required")
        elif isinstance(cause, RequestError):
            lines.append(f"{param}: {cause}" if param else str(cause))
            param = param or cause.param or ""
        else:
            message = detail["msg"]
            lines.append(f"{param}: {message[:1].lower()}{message[1:]}" if param else message)
        params.append(param)
    if error.error_count() > _MAX_MISTAKES:
        lines.append(f"and {error.error_count() - _MAX_MISTAKES:,} more mistakes")
    return kinds[0]("; ".join(lines), params[0] or None)
