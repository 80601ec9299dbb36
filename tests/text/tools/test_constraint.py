"""The grammar of calls: whatever a model draws under it, the parser reads as calls with valid arguments."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
from tokenizers import AddedToken

from loray.bases.registry import BaseModel
from loray.bases.tokenizer import FILE
from loray.errors import RequestError
from loray.spec import Constraint, Tool, ToolParserName, ToolUse
from loray.text.grammar import GrammarCompiler
from loray.text.tools import MARKERS, calls_constraint, parser_for, with_tools
from tests.fixtures.tiny import byte_tokenizer

POINT: dict[str, Any] = {
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/n"}, "c": {"enum": ["red", "blue"]}},
    "required": ["x", "c"],
    "additionalProperties": False,
}
DRAW = Tool("draw", POINT, strict=True)
CLEAR = Tool("clear", {"additionalProperties": False})
ANY = Tool("any", {"type": "object", "minProperties": 3, "x-unknown": 1})
FORMS: tuple[ToolParserName, ...] = get_args(ToolParserName)


class Tokens:
    """A base's tokenizer, whose markers are text, or tokens of their own."""

    def __init__(self, base: BaseModel, folder: Path, kind: str) -> None:
        tokenizer = byte_tokenizer()
        if kind != "text":
            markers = [
                AddedToken(m, special=kind == "special", normalized=False) for ms in MARKERS.values() for m in ms
            ]
            tokenizer.add_tokens(markers, special_tokens=kind == "special")
            tokenizer.backend_tokenizer.save(str(folder / FILE))
            base = replace(base, path=folder)
        self.ids: dict[str, int] = tokenizer.get_added_vocab()
        self.compiler, self.tokenizer = GrammarCompiler(base), tokenizer

    def constraint(self, use: ToolUse, form: ToolParserName, answer: Constraint | None = None) -> Constraint:
        found = calls_constraint(use, form, self.ids.get, answer)
        assert found is not None
        return found

    def matches(self, constraint: Constraint, text: str) -> bool:
        matcher = self.compiler.compile(constraint)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def drawn(self, constraint: Constraint, seed: int, num: int = 400) -> str | None:
        """A text drawn uniformly from the tokens that may come next; None if it does not end in `num` tokens."""
        matcher, rng, ids = self.compiler.compile(constraint), random.Random(seed), list[int]()
        end = self.tokenizer.eos_token_id
        while len(ids) < num:
            bias = matcher.compute_logit_bias()
            allowed = [i for i, b in enumerate(bias) if b]
            if end in allowed and (len(allowed) == 1 or rng.random() < 0.3):
                return str(self.tokenizer.decode(ids))
            ids.append(rng.choice([i for i in allowed if i != end]))
            assert matcher.consume_token(ids[-1])
        return None


@pytest.fixture(scope="module", params=["text", "special", "added"])
def tokens(request: Any, tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Markers are special tokens in Mistral's and Llama's tokenizers, and added ones that are not special in Qwen's."""
    return Tokens(tiny_base(), tmp_path_factory.mktemp("tokens"), request.param)


def read(form: ToolParserName, use: ToolUse, text: str) -> tuple[str, list[tuple[str, str]]]:
    parser = parser_for(form, use)
    said, calls = "", list[tuple[str, str]]()
    for piece in (*parser.push(text), *parser.finish()):
        if isinstance(piece, str):
            said += piece
        elif piece.name is not None:
            calls.append((piece.name, piece.arguments))
        else:
            calls[-1] = calls[-1][0], calls[-1][1] + piece.arguments
    return said, calls


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "use",
    [
        ToolUse((DRAW, CLEAR), "required"),
        ToolUse((DRAW, CLEAR), "draw", named=True),
        ToolUse((DRAW,), "required", False),
    ],
)
def test_forced_calls_are_calls_and_valid(tokens: Tokens, form: ToolParserName, use: ToolUse) -> None:
    constraint, schemas = tokens.constraint(use, form), {t.name: t.parameters for t in use.callable}
    counts = set[int]()
    for seed in range(10):
        text = tokens.drawn(constraint, seed)
        if text is None:
            continue
        said, calls = read(form, use, text)
        assert said == ""
        assert calls
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), schemas[name])
        counts.add(len(calls))
    assert counts == {1} if use.num_calls == 1 else len(counts) > 1


RICH: dict[str, Any] = {
    "$defs": {"color": {"type": "string", "enum": ["dark red", "blue"]}},
    "type": "object",
    "properties": {
        "first": {"type": "string", "maxLength": 3, "description": "whose texts may be of any characters"},
        "color": {"$ref": "#/$defs/color"},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
        "flag": {"type": "boolean"},
        "maybe": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 2}, {"type": "null"}]},
        "either": {"type": ["string", "integer"], "maxLength": 2, "minimum": 90, "maximum": 95},
        "rows": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/color"}},
        "fixed": {"enum": ["x", 1, None]},
    },
    "required": ["color", "flag", "either"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_each_type_are_valid_and_may_be_left_out(tokens: Tokens, form: ToolParserName) -> None:
    use = ToolUse((Tool("rich", RICH, strict=True),), "required", parallel=False)
    constraint, keys = tokens.constraint(use, form), set[str]()
    for seed in range(20):
        text = tokens.drawn(constraint, seed, num=800)
        assert text is not None
        said, [(name, arguments)] = read(form, use, text)
        assert (said, name) == ("", "rich")
        found = json.loads(arguments)
        jsonschema.validate(found, RICH)
        keys |= found.keys()
    assert keys == RICH["properties"].keys()


@pytest.mark.parametrize(
    ("form", "parameter", "what"),
    [
        ("qwen3_coder", {"type": "string", "pattern": "^a+$"}, "'pattern' of a parameter"),
        ("pythonic", {"type": "string", "not": {}}, "cannot be enforced"),
    ],
)
def test_what_a_form_cannot_enforce_is_refused_where_it_is_strict(
    tokens: Tokens, form: ToolParserName, parameter: dict[str, Any], what: str
) -> None:
    tool = Tool("f", {"type": "object", "properties": {"a": parameter}})
    tokens.compiler.compile(tokens.constraint(ToolUse((tool,), "required"), form))
    with pytest.raises(RequestError, match=what):
        tokens.compiler.compile(tokens.constraint(ToolUse((replace(tool, strict=True),)), form))
    itself = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 9}}, "properties": {"a": {"$ref": "#/$defs/a"}}}
    tokens.constraint(ToolUse((Tool("f", itself),), "required"), form)  # ends
    more = Tool("f", {"additionalProperties": {"type": "integer"}}, strict=True)
    with pytest.raises(RequestError, match="'additionalProperties' of its parameters"):
        tokens.constraint(ToolUse((more,)), form)


@pytest.mark.parametrize("form", FORMS)
def test_free_text_with_calls_of_a_strict_function(tokens: Tokens, form: ToolParserName) -> None:
    good, free, bad = ('{"x": 3, "c": "red"}', '{"y": [1, {}]}', '{"x": 3}')
    use = ToolUse((DRAW, CLEAR))
    constraint = tokens.constraint(use, form)
    assert tokens.matches(constraint, "Just words.\n{ }")
    written = {name: write(form, name, tokens) for name in ("draw", "clear", "other")}
    assert tokens.matches(constraint, written["draw"](good))
    assert tokens.matches(constraint, written["clear"](free))
    assert not tokens.matches(constraint, written["draw"](bad))
    assert not tokens.matches(constraint, written["other"](good))
    if form not in ("llama3_json", "pythonic"):
        assert tokens.matches(constraint, f"I see.\n{written['draw'](good)}{written['clear'](free)}")
        once = tokens.constraint(replace(use, parallel=False), form)
        assert tokens.matches(once, f"I see.\n{written['draw'](good)}")
        assert not tokens.matches(once, f"I see.\n{written['draw'](good)}{written['clear'](free)}")


def written(form: ToolParserName, name: str, arguments: str) -> str:
    call = {"function": {"name": name, "arguments": arguments}}
    return str(with_tools([{"role": "assistant", "content": "", "tool_calls": [call]}], [], form)[1]["content"])


def write(form: ToolParserName, name: str, tokens: Tokens) -> Callable[[str], str]:
    match form:
        case "hermes":
            return lambda a: f'<tool_call>\n{{"name": "{name}", "arguments": {a}}}\n</tool_call>'
        case "llama3_json":
            return lambda a: f'{{"name": "{name}", "parameters": {a}}}'
        case "pythonic" | "qwen3_coder":
            return lambda a: written(form, name, a)
    if "[ARGS]" in tokens.ids:
        return lambda a: f"[TOOL_CALLS]{name}[ARGS]{a}"
    return lambda a: f'[TOOL_CALLS][{{"name": "{name}", "arguments": {a}}}]'


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_by_schema_or_a_call(tokens: Tokens, form: ToolParserName) -> None:
    constraint = tokens.constraint(ToolUse((DRAW,)), form, Constraint.from_schema(POINT))
    assert tokens.matches(constraint, '{"x": 3, "c": "red"}')
    tag = "<|python_tag|>" if form == "llama3_json" else ""
    assert tokens.matches(constraint, tag + write(form, "draw", tokens)('{"x": 3, "c": "red"}'))
    assert not tokens.matches(constraint, "Words.")
    with pytest.raises(RequestError, match="JSON schema"):
        tokens.constraint(ToolUse((DRAW,)), form, Constraint.from_regex("a"))


def test_words_for_readers_are_not_part_of_the_grammar(tokens: Tokens) -> None:
    schema: dict[str, Any] = {
        "title": "((((",
        "type": "object",
        "properties": {
            "title": {"description": "((((" * 1000, "anyOf": [{"const": {"title": 1}}, {"examples": ["(" * 300]}]},
            "description": {"enum": [{"default": 2}]},
        },
        "required": ["title", "description"],
        "additionalProperties": False,
    }
    constraint = tokens.constraint(ToolUse((Tool("f", schema),), "required"), "hermes")
    assert "(((" not in constraint.text
    called = write("hermes", "f", tokens)
    assert tokens.matches(constraint, called('{"title": {"title": 1}, "description": {"default": 2}}'))
    assert not tokens.matches(constraint, called('{"title": 1, "description": {}}'))


def test_the_model_is_free_where_nothing_is_asked(tokens: Tokens) -> None:
    assert calls_constraint(ToolUse((CLEAR, ANY)), "hermes", tokens.ids.get) is None


@pytest.mark.parametrize("form", FORMS)
def test_keywords_that_cannot_be_enforced_are_refused_for_strict_functions_only(
    tokens: Tokens, form: ToolParserName
) -> None:
    odd = replace(ANY, parameters={"type": "object", "propertyNames": {"pattern": "a"}, "minProperties": 3})
    tokens.compiler.compile(tokens.constraint(ToolUse((odd,), "required"), form))
    with pytest.raises(RequestError, match="cannot be enforced"):
        tokens.compiler.compile(tokens.constraint(ToolUse((replace(odd, strict=True),)), form))
