"""What is checked of a constraint before an engine sees it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import RequestError
from loray.spec import Constraint
from loray.spec.generation import MAX_CHARACTERS, Tag
from loray.text.grammar import GrammarChecker, GrammarCompiler


def matches(base: BaseModel, constraint: Constraint, text: str) -> bool:
    compiler = GrammarCompiler(base)
    matcher = compiler.compile(constraint)
    return bool(matcher.consume_tokens(compiler.tokenizer.tokenize_str(text)) and matcher.is_accepting())


SCHEMA = Constraint.from_schema(
    {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["a"], "type": "object"}
)


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        (SCHEMA, ['{"a": 1}', '{ "a" :1,\n"b": [null]}', '{"a":1,"c":2}'], ['{"b": 1}', '{"a": "1"}', "[]"]),
        (SCHEMA.model_copy(update={"whitespace": ""}), ['{"a":1}'], ['{"a": 1}']),
        (SCHEMA.model_copy(update={"whitespace": " {1,2}"}), ['{"a":  1}', '{"a":1}'], ['{"a":   1}']),
        (Constraint.from_schema(True, whitespace=""), ["[1,{}]", "null"], ["nul"]),
        (Constraint.from_schema({"type": "string", "minLength": 2}), ['"ab"', '"\\n\\u0001"'], ['"a"', "ab"]),
        (Constraint.from_schema({"type": "string", "x-unknown": 1}), ['"a"'], ["1"]),
        (
            Constraint.from_schema({"type": "array", "uniqueItems": True}, lenient=True),
            ["[1, 1]"],
            ["{}"],
        ),
        (
            Constraint.from_regex(r"\d{3}/[a-z]+\/" + "\n" + r"\\?"),
            ["123/ab/\n", "123/ab/\n\\"],
            ["123/ab/", "12/ab/\n"],
        ),
        (Constraint.from_choice(["a b", 'q"\\', "", "\n", "é😀"]), ["a b", 'q"\\', "", "\n", "é😀"], ["a", "é"]),
        (
            Constraint.from_grammar('start: "a" (B | c)+\nB: /[0-9]/\nc: %json {"type": "null"}'),
            ["a1null2"],
            ["a", "a1nul"],
        ),
        (Constraint.from_grammar('\n  ?start: x\n  ?x: "a" ("," "a")*'), ["a", "a,a"], ["a,"]),
        (Constraint.from_grammar('root ::= ("a" | "b")+ [0-9]'), ["ab1", "b0"], ["ab"]),
        (Constraint.from_grammar("start: /a+/ <|im_end|>"), [], ["a"]),
        (
            Constraint.from_tags(
                [Tag("<f=x>", {"type": "integer"}, "</f>"), Tag("<f=y>", {"type": "null"}, "")], ["<f="]
            ),
            ["hello", "well <f=x>12</f> and <f=y>null then", "a < b"],
            ["<f=z>", "<f=x>null</f>", "<f=x>1"],
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Constraint) else "",
)
def test_constraints_mean_what_they_say(
    base: BaseModel, constraint: Constraint, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not matches(base, constraint, text)] == []
    assert [text for text in bad if matches(base, constraint, text)] == []


def test_what_is_checked_at_once_is_compiled_once(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a caller that leaves takes nothing from the others."""
    compiled: list[Constraint] = []
    go_on = threading.Event()

    def compile_(self: GrammarCompiler, constraint: Constraint) -> Any:
        compiled.append(constraint)
        assert go_on.wait(60)
        return real(self, constraint)

    real = GrammarCompiler.compile
    monkeypatch.setattr(GrammarCompiler, "compile", compile_)

    async def check() -> None:
        checker = GrammarChecker(base)
        tasks = [asyncio.create_task(checker.check(SCHEMA.model_copy())) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        go_on.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(results[0]), *results[1:]] == [asyncio.CancelledError, *[()] * 4]
        await checker.check(SCHEMA)
        checker.close()

    asyncio.run(check())
    assert compiled == [SCHEMA]


def test_a_base_without_a_tokenizer_says_so(base: BaseModel, tmp_path: Path) -> None:
    compiler = GrammarCompiler(replace(base, path=tmp_path))
    compiler.warm()
    with pytest.raises(RequestError, match="cannot be held to a constraint"):
        compiler.compile(SCHEMA)


BRACKETS = "(" * 50_000
REFUSED: dict[str, tuple[Constraint, str]] = {
    "unsupported keyword": (Constraint.from_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    "unsatisfiable": (Constraint.from_schema(False), "JSON schema cannot be enforced"),
    "wrong schema": (Constraint.from_schema({"type": "strin"}), "JSON schema cannot be enforced"),
    "endless": (Constraint.from_schema({"$ref": "#"}), "no answer can match"),
    "remote reference": (Constraint.from_schema({"$ref": "https://example.com/schema.json"}), "JSON schema cannot be"),
    "no JSON": (Constraint(kind="json_schema", text="{"), "cannot be read"),
    "regex": (Constraint.from_regex("a("), "regular expression cannot be enforced"),
    "look-around": (Constraint.from_regex("(?=a)b"), "regular expression cannot be enforced"),
    "lark": (Constraint.from_grammar("start: a"), "grammar cannot be enforced"),
    "no start": (Constraint.from_grammar('a: "b"'), "grammar cannot be read"),
    "gbnf": (Constraint.from_grammar('root ::= ("a"'), "grammar cannot be read"),
    "no rules": (Constraint.from_grammar(""), "grammar cannot be read"),
    "unknown rule": (Constraint.from_grammar("root ::= other"), "grammar cannot be read"),
    "special token": (Constraint.from_grammar("start: <|no_such_token|>"), "grammar cannot be enforced"),
    "long": (Constraint.from_regex("a" * (MAX_CHARACTERS + 1)), "may have"),
    "deep regex": (Constraint.from_regex(BRACKETS), "nest"),
    "deep grammar": (Constraint.from_grammar(f"start: {BRACKETS}"), "nest"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(base: BaseModel, name: str) -> None:
    constraint, message = REFUSED[name]

    async def check() -> None:
        checker = GrammarChecker(base)
        for _ in range(2):  # the second time from memory
            with pytest.raises(RequestError, match=message) as raised:
                await checker.check(constraint, "guided_json")
            assert raised.value.param == "guided_json"
            assert "\n" not in str(raised.value)
        checker.close()

    asyncio.run(check())
