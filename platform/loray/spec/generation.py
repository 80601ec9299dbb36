"""Generation: a request with its sampling parameters, constraint and tools, and the deltas of its answer.

The grammars are those of llguidance, which computes the masks: https://github.com/guidance-ai/llguidance/tree/main/docs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints

from loray.spec.access import DEFAULT_TENANT
from loray.spec.adapters import AdapterRef
from loray.spec.fields import Frozen

Schema = Mapping[str, Any] | bool
MAX_CHARACTERS = 64 << 10  # of a schema, pattern, list of texts or grammar
ANY_OBJECT: Schema = {"type": "object"}


class Tag(NamedTuple):
    """A part of a text that must be JSON by `schema`, between `begin` and `end`."""

    begin: str
    schema: Schema
    end: str


class Constraint(Frozen):
    """A form that the answer must have. Equal ones have equal fields, so that what was compiled can be looked up.

    kind        what `text` is
    text        json_schema: the schema as JSON; regex: for the whole answer, in the syntax of Rust's regex, but that
                \\d, \\w and \\s are ASCII's; choice: a JSON list of texts; grammar: Lark as in llguidance's
                docs/syntax.md, or GBNF
    whitespace  json_schema: a regular expression for the space between two tokens of JSON; "": none; None: any
    lenient     json_schema: keywords that cannot be enforced are ignored, not refused
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str
    whitespace: str | None = None
    lenient: bool = False

    @classmethod
    def from_schema(cls, schema: Schema, *, whitespace: str | None = None, lenient: bool = False) -> Self:
        """JSON that validates against `schema` (draft 2020-12), with an object's properties in the schema's order."""
        return cls(kind="json_schema", text=json.dumps(schema), whitespace=whitespace, lenient=lenient)

    @classmethod
    def from_regex(cls, pattern: str) -> Self:
        return cls(kind="regex", text=pattern)

    @classmethod
    def from_choice(cls, texts: Sequence[str]) -> Self:
        """Exactly one of `texts`."""
        return cls(kind="choice", text=json.dumps(list(texts)))

    @classmethod
    def from_grammar(cls, grammar: str) -> Self:
        """Lark or GBNF. Lark may contain `%json {schema}`, and special tokens as `<|im_end|>`."""
        return cls(kind="grammar", text=grammar)

    @classmethod
    def from_tags(cls, tags: Sequence[Tag], triggers: Sequence[str]) -> Self:
        """Any text, but where a trigger occurs in it, one of the tags that begin with that trigger follows.

        ValueError for a tag that begins with no trigger.
        """
        rules = []
        for i, tag in enumerate(tags):
            trigger = next((t for t in triggers if t and tag.begin.startswith(t)), None)
            if trigger is None:
                raise ValueError(f"no trigger is the beginning of {tag.begin!r}")
            parts = (json.dumps(tag.begin[len(trigger) :]), f"%json {json.dumps(tag.schema)}", json.dumps(tag.end))
            rules.append(f"head_{i}[lazy]: TEXT {json.dumps(trigger)}")
            rules.append(f"tag_{i}: head_{i} {' '.join(part for part in parts if part != json.dumps(''))}")
        options = " | ".join(f"tag_{i}" for i in range(len(tags)))
        return cls.from_grammar("\n".join((f"start: ({options})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/", *rules)))


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. `parameters` is the JSON schema of its arguments; `strict`: they must be valid by it."""

    name: str
    parameters: Mapping[str, Any]
    description: str | None = None
    strict: bool = False

    def for_template(self) -> dict[str, Any]:
        """The tool in OpenAI's form, which chat templates read."""
        about = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, of which there is at least one, and whether they are called.

    choice    auto: the model decides; required: it calls at least one; else the name of the one that it calls, once
    parallel  one answer may have several calls
    """

    tools: tuple[Tool, ...]
    choice: str = "auto"
    parallel: bool = True
    named: bool = False

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        return tuple(t for t in self.tools if t.name == self.choice) if self.named else self.tools

    @property
    def forced(self) -> bool:
        """The answer is calls and nothing else."""
        return self.named or self.choice == "required"

    @property
    def num_calls(self) -> int | None:
        """The largest number of calls of one answer; None: any."""
        return None if self.parallel and not self.named else 1


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A step's part of call number `index` of an answer: first id and name, then more of the arguments' JSON."""

    index: int
    id: str | None
    name: str | None
    arguments: str


Pooling = Literal["last", "mean"]  # of the prompt's hidden states, after the final norm
FinishReason = Literal["stop", "length", "tool_calls"]  # tool_calls: a chat's, where a parser found calls
OutputKind = Literal["delta", "final"]
BadWord = Annotated[tuple[int, ...], Field(min_length=1)]


class Thinking(Frozen):
    """The thought with which an answer may begin, told from its content by tokens.

    start_id, end_id  the tokens that open and close it
    state             after the prompt it is open; over, so that the answer is content; or may be, where the answer's
                      first token opens one
    budget            its most tokens, after which `end_id` is forced; None: any number
    """

    start_id: int
    end_id: int
    state: Literal["open", "may be", "over"] = "may be"
    budget: int | None = Field(default=None, ge=0)


class SamplingParams(Frozen):
    """Sampling parameters, with vLLM's names and meanings. `temperature=0` is greedy."""

    max_tokens: int = Field(default=16, ge=0, description="0: the prompt is only scored")
    min_tokens: int = Field(default=0, ge=0, description="before them neither EOS nor stop ends the text")
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: off")
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100, description="over prompt and output; 1: off")
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    seed: int | None = None
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(default=(), max_length=16)
    stop_token_ids: tuple[int, ...] = Field(default=(), max_length=128)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=20, description="top alternatives per token; None: off")
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20, description="the same of the prompt's tokens")
    structured: Constraint | None = Field(default=None, description="what the answer must match")
    thinking: Thinking | None = Field(
        default=None, description="before what must match, or with a budget; None: there is nothing to do about it"
    )
    allowed_token_ids: tuple[int, ...] | None = Field(default=None, min_length=1, description="no other is sampled")
    bad_words: tuple[BadWord, ...] = Field(default=(), max_length=1024, description="as tokens")

    @property
    def changes_logits(self) -> bool:
        """Some tokens' logits are changed before temperature, beside what the constraint forbids."""
        return bool(
            self.logit_bias
            or self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.min_tokens
            or self.allowed_token_ids is not None
            or self.bad_words
        )


class PoolingParams(Frozen):
    """An embedding: the hidden state of the prompt's last token, or the mean of all. Of that the first `dimensions`
    numbers (None: all), which are then scaled to length 1 if `normalize`.
    """

    kind: Pooling
    dimensions: int | None = Field(default=None, gt=0)
    normalize: bool = True


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One request. `adapter` None is the base model.

    tenant      that is charged for the request; all requests without one belong to the same tenant
    priority    a smaller number is served earlier, as in vLLM
    ttft_slo_s  seconds within which the first token is needed; None: the deployment's target
    cache_salt  the prefix cache and what guesses come from are shared with requests of the same salt alone
    traceparent  of the trace that the request is a part of, as W3C writes it; None: it is not traced
    pooling      an embedding is wanted and no answer, so max_tokens is 0
    output_ids   of the answer so far, where another engine has begun it: the results are those after them
    output_kind  delta: each token is given when it has been computed. final: nobody reads along, so that those after
                 the first one come some at a time
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    adapter: AdapterRef | None = None
    tenant: str = ""
    priority: int = 0
    ttft_slo_s: float | None = None
    cache_salt: str = ""
    traceparent: str | None = None
    pooling: PoolingParams | None = None
    output_ids: tuple[int, ...] = ()
    output_kind: OutputKind = "delta"


def cache_salt(tenant: str, given: str | None) -> str:
    """The salt of a tenant's request that gives one or none. Requests of two tenants never have the same: no tenant's
    name has a slash.
    """
    salt = given or ""
    return salt if tenant == DEFAULT_TENANT and "/" not in salt else f"{tenant}/{salt}"


class TokenLogprobs(NamedTuple):
    """Natural logarithms of a token's probabilities, before temperature and penalties. `top`: (token, logprob), best
    first; `rank`: 1 for the best token.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    rank: int


class TokenDelta(NamedTuple):
    """The tokens that one step, or several that were merged, added to a request. The last one has a finish reason.

    logprobs         of `token_ids`, if the request asks for them
    prompt_logprobs  of the prompt's tokens from the second on; with the first delta, if the request asks for them
    embedding        with the finish reason, if the request has a pooling
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    embedding: tuple[float, ...] | None = None


class TokenLogprob(NamedTuple):
    """TokenLogprobs with texts. `top`: (token id, text, logprob), best first. A prompt's first token has no logprob."""

    token_id: int
    token: str
    logprob: float | None
    top: tuple[tuple[int, str, float], ...]
    rank: int


class Delta(NamedTuple):
    """A TokenDelta with its text. Counts are totals so far; `prompt_logprobs` come with the first delta.

    stop_reason  the stop string or the token of `stop_token_ids` that ended the text; None at any other end
    reasoning    the new part of what a reasoning model thinks before its answer, which is no part of `text`
    num_reasoning_tokens  of `num_output_tokens` those of the thought, without the tokens that open and close it
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: tuple[ToolCallDelta, ...] = ()
    stop_reason: str | int | None = None
    reasoning: str = ""
    num_reasoning_tokens: int = 0
