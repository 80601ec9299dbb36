"""Structured output: `response_format`, `structured_outputs` and `guided_*`, as constraints on the answer."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from loray.errors import RequestError
from loray.schemas.openai.fields import MAX_DESCRIPTION, Body, ShortText
from loray.spec import Constraint
from loray.spec.generation import ANY_OBJECT, MAX_CHARACTERS, Schema, Tag

MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_NODES = 20_000
MAX_SCHEMA_MEMBERS = 1_000  # of one object: properties that may be absent take time with their number squared, 0.1 s
MAX_CHOICES = 10_000


class RequestedConstraint(NamedTuple):
    """The constraint of a request, and the field that asks for it."""

    param: str
    constraint: Constraint


def schema(value: object) -> object:
    """A JSON schema: an object, a boolean, or either of them as JSON in a string."""
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise RequestError(
                f"must be a JSON schema of at most {MAX_CHARACTERS:,} characters, and has {len(value):,}"
            )
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as e:
            raise RequestError(f"must be a JSON schema, and is not JSON: {e}") from e
    if not isinstance(value, dict | bool):
        raise RequestError("must be a JSON schema: an object")
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    level, num_nodes = [value], 0
    for _ in range(MAX_SCHEMA_DEPTH):
        if any(len(node) > MAX_SCHEMA_MEMBERS for node in level if isinstance(node, dict)):
            raise RequestError(f"an object of the schema has more than {MAX_SCHEMA_MEMBERS:,} members; use fewer")
        level = [child for node in level for child in _children(node)]
        num_nodes += len(level)
        if num_nodes > MAX_SCHEMA_NODES:
            raise RequestError(f"the schema has more than {MAX_SCHEMA_NODES} values; use a smaller one")
        if not level:
            return
    raise RequestError(f"the schema is nested deeper than {MAX_SCHEMA_DEPTH} levels; use $defs and $ref")


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


JsonSchema = Annotated[dict[str, Any] | bool, BeforeValidator(schema)]
GrammarText = Annotated[str, Field(max_length=MAX_CHARACTERS)]


class NamedSchema(Body):
    """`strict` true: keywords that cannot be enforced are refused; otherwise they are ignored, as OpenAI does."""

    name: ShortText | None = None
    description: Annotated[str, Field(max_length=MAX_DESCRIPTION)] | None = None
    schema_: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class TagForm(Body):
    begin: Annotated[GrammarText, Field(min_length=1)]
    schema_: JsonSchema = Field(default=True, alias="schema")
    end: GrammarText = ""


class AnswerFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    structures: list[TagForm] | None = None
    triggers: list[ShortText] | None = None

    def constraint(self) -> Constraint | None:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise RequestError('json_schema belongs to {"type": "json_schema"}, which needs it', "response_format")
        if any((f is not None) != (self.type == "structural_tag") for f in (self.structures, self.triggers)):
            raise RequestError(
                'structures and triggers belong to {"type": "structural_tag"}, which needs them', "response_format"
            )
        if self.json_schema is not None:
            return Constraint.from_schema(self.json_schema.schema_, lenient=not self.json_schema.strict)
        if self.structures is not None and self.triggers is not None:
            return _tags(self.structures, self.triggers, "response_format")
        return Constraint.from_schema(ANY_OBJECT) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """vLLM's `structured_outputs`. Options that only choose a backend are accepted."""

    json_: JsonSchema | None = Field(default=None, alias="json")
    regex: GrammarText | None = None
    choice: Annotated[list[GrammarText], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    structural_tag: GrammarText | None = None
    whitespace_pattern: ShortText | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    disable_fallback: bool = False

    def constraints(self) -> dict[str, Constraint]:
        """Every constraint that is given, by its field."""
        if self.disable_additional_properties:
            raise RequestError(
                "disable_additional_properties is not supported; write additionalProperties: false into the schema",
                "structured_outputs",
            )
        space = "" if self.disable_any_whitespace else self.whitespace_pattern
        tags = None if self.structural_tag is None else _tags_from_json(self.structural_tag, "structured_outputs")
        found = _constraints(self.json_, self.regex, self.choice, self.grammar, self.json_object, space)
        return {f"structured_outputs.{name}": c for name, c in found.items()} | (
            {} if tags is None else {"structured_outputs.structural_tag": tags}
        )


class StructuredFields(BaseModel):
    """The fields of a request that say what its answer must match; at most one of them may."""

    response_format: AnswerFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = Field(default=None, description="structured_outputs.json, as older vLLM has it")
    guided_regex: GrammarText | None = None
    guided_choice: Annotated[list[GrammarText], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    guided_grammar: GrammarText | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: ShortText | None = None
    guided_decoding_backend: ShortText | None = Field(default=None, description="accepted; there is one")
    structural_tag: GrammarText | None = Field(
        default=None, description="structured_outputs.structural_tag, as older vLLM"
    )

    @cached_property
    def constraint(self) -> RequestedConstraint | None:
        """The constraint that the answer must match, and the field that says so. Raises RequestError if several do."""
        found = _constraints(
            self.guided_json,
            self.guided_regex,
            self.guided_choice,
            self.guided_grammar,
            self.guided_json_object,
            self.guided_whitespace_pattern,
        )
        given = {f"guided_{name}": c for name, c in found.items()}
        if self.structural_tag is not None:
            given["structural_tag"] = _tags_from_json(self.structural_tag, "structural_tag")
        if self.structured_outputs is not None:
            given |= self.structured_outputs.constraints()
        answer = None if self.response_format is None else self.response_format.constraint()
        if answer is not None:
            given["response_format"] = answer
        if len(given) > 1:
            raise RequestError(f"an answer can match one constraint only; choose from {', '.join(given)}", min(given))
        return next((RequestedConstraint(param, constraint) for param, constraint in given.items()), None)


def _constraints(
    schema: Schema | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    json_object: bool | None,
    whitespace: str | None,
) -> dict[str, Constraint]:
    found: dict[str, Constraint] = {}
    if schema is not None:
        found["json"] = Constraint.from_schema(schema, whitespace=whitespace)
    if regex is not None:
        found["regex"] = Constraint.from_regex(regex)
    if choice is not None:
        found["choice"] = Constraint.from_choice(choice)
    if grammar is not None:
        found["grammar"] = Constraint.from_grammar(grammar)
    if json_object:
        found["json_object"] = Constraint.from_schema(ANY_OBJECT, whitespace=whitespace)
    return found


def _tags(forms: list[TagForm], triggers: list[str], param: str) -> Constraint:
    try:
        return Constraint.from_tags([Tag(f.begin, f.schema_, f.end) for f in forms], triggers)
    except ValueError as e:
        raise RequestError(f"{param}: {e}", param) from e


def _tags_from_json(text: str, param: str) -> Constraint:
    """vLLM's `structural_tag`: the JSON of a response_format of that type."""
    try:
        form = AnswerFormat.model_validate_json(text)
    except ValidationError as e:
        raise RequestError(
            f'structural_tag must be JSON of {{"type": "structural_tag", "structures": [...], "triggers": [...]}}: {e}',
            param,
        ) from e
    constraint = form.constraint() if form.type == "structural_tag" else None
    if constraint is None:
        raise RequestError('structural_tag must be of {"type": "structural_tag"}', param)
    return constraint
