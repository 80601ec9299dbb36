"""Parsers of tool calls: what they find, what they leave as text, and that no cut of the text changes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loray.spec import Tool, ToolCallDelta, ToolParserName, ToolUse
from loray.text.tools import Piece, ToolParser, detect, parser_for, with_tools
from loray.text.tools.parsers import CharacterParser, QwenCoderParser
from tests.text.chat_templates import LLAMA, MISTRAL, PYTHONIC, QWEN, QWEN_CODER

TYPED: dict[str, Any] = {
    "$defs": {"n": {"type": "integer"}},
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "number": {"$ref": "#/$defs/n"},
        "flag": {"type": "boolean"},
        "nothing": {"type": "null"},
        "list": {"type": "array"},
        "object": {"type": "object"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "any": {},
    },
}
USE = ToolUse((Tool("add", {}), Tool("now", {}), Tool("put", TYPED)))
A, B = '{"a": [1, {"b": "}]"}], "c": "\\"</tool_call>"}', "{}"
H1 = f'<tool_call>\n{{"name": "add", "arguments": {A}}}\n</tool_call>'
H2 = f'<tool_call>{{"arguments": {B}, "name": "now", "id": 3}}</tool_call>'
L1, L2 = f'{{"name": "add", "parameters": {A}}}', '{"name": "now"}'
Q2 = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
M1, M2 = f'{{"name": "add", "arguments": {A}}}', '{"name": "now", "arguments": null}'


def qwen(**arguments: Any) -> str:
    """A call of `put` as Qwen3-Coder's template writes it."""
    texts = {k: json.dumps(v) if isinstance(v, list | dict) else str(v) for k, v in arguments.items()}
    body = "".join(f"<parameter={k}>\n{text}\n</parameter>\n" for k, text in texts.items())
    return f"<tool_call>\n<function=put>\n{body}</function>\n</tool_call>"


class Result(NamedTuple):
    text: str
    calls: list[tuple[str, str]]


def read(form: ToolParserName, chunks: Iterable[str]) -> Result:
    parser: ToolParser = parser_for(form, USE)
    pieces: list[Piece] = [piece for chunk in chunks for piece in parser.push(chunk)] + list(parser.finish())
    return joined(pieces)


def read_slowly(form: ToolParserName, text: str) -> Result:
    """Each character through the generator, which `push` leaves out where it can."""
    parser = parser_for(form, USE)
    assert isinstance(parser, CharacterParser)
    for c in text:
        parser._reading.send(c)
    return joined(parser.finish())


def joined(pieces: Sequence[Piece]) -> Result:
    """As a client joins the deltas of a stream; checks their form on the way."""
    text, calls, ids = "", list[tuple[str, str]](), set[str]()
    for piece in pieces:
        if isinstance(piece, str):
            assert piece
            text += piece
        elif piece.id is not None:
            assert piece == ToolCallDelta(len(calls), piece.id, piece.name, "")
            assert piece.id not in ids
            assert len(piece.id) == len("call_") + 24
            ids.add(piece.id)
            calls.append((piece.name or "", ""))
        else:
            assert piece.name is None
            assert piece.index == len(calls) - 1
            assert piece.arguments
            calls[-1] = calls[-1][0], calls[-1][1] + piece.arguments
    return Result(text, calls)


BOTH = [("add", A), ("now", B)]
CASES: dict[str, tuple[ToolParserName, str, Result]] = {
    "hermes: text, then two calls": ("hermes", f"I add.\n\n{H1}\n{H2}\n", Result("I add.", BOTH)),
    "hermes: text after a call": ("hermes", f"{H1} so.", Result("so.", BOTH[:1])),
    "hermes: no end marker": ("hermes", f"{H1.removesuffix('</tool_call>')}{H2}", Result("", BOTH)),
    "hermes: a brace is missing": ("hermes", H1.replace("}\n</", "\n</") + H2, Result("", BOTH)),
    "hermes: cut off in the arguments": ("hermes", H1[:60], Result("", [("add", H1[41:60])])),
    "hermes: cut off before them": ("hermes", H1[:40], Result(H1[:40], [])),
    "hermes: arguments that are no JSON": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": {"a": oh}}</tool_call> and',
        Result("and", [("add", '{"a": oh}}')]),
    ),
    "hermes: no object": ("hermes", "<tool_call>add(1)</tool_call>", Result("<tool_call>add(1)</tool_call>", [])),
    "hermes: no name": ("hermes", '<tool_call>{"arguments": {}}', Result('<tool_call>{"arguments": {}}', [])),
    "hermes: arguments that are no object": (
        "hermes",
        '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
        Result('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', []),
    ),
    "hermes: another marker": ("hermes", " <tool_calls> <tool", Result(" <tool_calls> <tool", [])),
    "hermes: after a malformed call": ("hermes", f"<tool_call> {H1}", Result("<tool_call> ", BOTH[:1])),
    "llama: one call": ("llama3_json", L1, Result("", BOTH[:1])),
    "llama: two calls": ("llama3_json", f"\n{L1}; {L2}\n", Result("", BOTH)),
    "llama: after its tag": ("llama3_json", f"Well.<|python_tag|>{L1}", Result("Well.", BOTH[:1])),
    "llama: not the name of a tool": (
        "llama3_json",
        '{"name": "Ann", "age": 3}',
        Result('{"name": "Ann", "age": 3}', []),
    ),
    "llama: JSON in a text": ("llama3_json", f"so {L1}", Result(f"so {L1}", [])),
    "llama: code": ("llama3_json", "<|python_tag|>print(1)", Result("<|python_tag|>print(1)", [])),
    "llama: text after a call": ("llama3_json", f"{L1}; or", Result("; or", BOTH[:1])),
    "mistral: an array": ("mistral", f"Hm. [TOOL_CALLS] [{M1}, {M2}]\n", Result("Hm.", BOTH)),
    "mistral: an object": ("mistral", f"[TOOL_CALLS]{M1}", Result("", BOTH[:1])),
    "mistral: an array cut off": ("mistral", f"[TOOL_CALLS][{M1},", Result("", BOTH[:1])),
    "mistral: with names": ("mistral", f"[TOOL_CALLS]add[ARGS]{A}[TOOL_CALLS]now[ARGS] {B}", Result("", BOTH)),
    "mistral: with ids": ("mistral", f"[TOOL_CALLS]add[CALL_ID]a1B[ARGS]{A}", Result("", BOTH[:1])),
    "mistral: no separator": ("mistral", f"[TOOL_CALLS]add{A}", Result("", BOTH[:1])),
    "mistral: no arguments": ("mistral", "[TOOL_CALLS]add[ARG] x", Result("[TOOL_CALLS]add[ARG] x", [])),
    "qwen coder: text, then two calls": (
        "qwen3_coder",
        f"I put.\n\n{qwen(text='a < b', number=3)}\n{Q2}\n",
        Result("I put.", [("put", '{"text": "a < b", "number": 3}'), ("now", "{}")]),
    ),
    "qwen coder: each type as its schema says": (
        "qwen3_coder",
        qwen(text=5, number=5, flag=True, nothing=None, list=[1, {"a": "b"}], object={}, maybe="5", any=False),
        Result(
            "",
            [
                (
                    "put",
                    '{"text": "5", "number": 5, "flag": true, "nothing": null, "list": [1, {"a": "b"}], "object": {}, '
                    '"maybe": "5", "any": false}',
                )
            ],
        ),
    ),
    "qwen coder: texts as they stand": (
        "qwen3_coder",
        qwen(text='\n if a > 1:\n\t"</function>"\n', maybe=None, any='"x'),
        Result("", [("put", '{"text": "\\n if a > 1:\\n\\t\\"</function>\\"\\n", "maybe": null, "any": "\\"x"}')]),
    ),
    "qwen coder: in one line": (
        "qwen3_coder",
        qwen(text="x", number=" 7 ").replace("\n", "") + ".",
        Result(".", [("put", '{"text": "x", "number": 7}')]),
    ),
    "qwen coder: what is no such value is a text": (
        "qwen3_coder",
        qwen(number="seven", flag="NaN"),
        Result("", [("put", '{"number": "seven", "flag": "NaN"}')]),
    ),
    "qwen coder: no end of the function": (
        "qwen3_coder",
        f"{qwen(number=1).replace('</function>', '')}{Q2}",
        Result("", [("put", '{"number": 1}'), ("now", "{}")]),
    ),
    "qwen coder: cut off": (
        "qwen3_coder",
        qwen(text="abcdef")[:47],
        Result("", [("put", '{"text": "abc')]),
    ),
    "qwen coder: JSON": ("qwen3_coder", H1, Result(H1, [])),
    "qwen coder: no name": ("qwen3_coder", "<tool_call><function=> a", Result("<tool_call><function=> a", [])),
    "pythonic: two calls": (
        "pythonic",
        "[add(a=1, b='x'), now()]",
        Result("", [("add", '{"a": 1, "b": "x"}'), ("now", "{}")]),
    ),
    "pythonic: every literal": (
        "pythonic",
        "[add(a=True,b = None, c=[ 1, -2.5e3,], d={'k': [False], 7: \"\"}, e=0x1F, f=1_000, g=.5, i={}, j=true)]\n",
        Result(
            "",
            [
                (
                    "add",
                    '{"a": true, "b": null, "c": [1, -2.5e3], "d": {"k": [false], "7": ""}, "e": 31, "f": 1000, '
                    '"g": 0.5, "i": {}, "j": true}',
                )
            ],
        ),
    ),
    "pythonic: texts": (
        "pythonic",
        r"""[add(a='it\'s "so"\n\x41\101\0\d', b="\ud83d\ude00\U0001F600", c='''a'b\nc''', d='x' "y" '')]""",
        Result(
            "", [("add", r"""{"a": "it's \"so\"\nAA\u0000\\d", "b": "\ud83d\ude00😀", "c": "a'b\nc", "d": "xy"}""")]
        ),
    ),
    "pythonic: between markers": (
        "pythonic",
        "So.<|python_start|>[now()]<|python_end|>",
        Result("So.", [("now", "{}")]),
    ),
    "pythonic: not the name of a tool": ("pythonic", "[adder(a=1)]", Result("[adder(a=1)]", [])),
    "pythonic: in a text": ("pythonic", "so [add(a=1)]", Result("so [add(a=1)]", [])),
    "pythonic: a list": ("pythonic", "[1, 2]", Result("[1, 2]", [])),
    "pythonic: cut off between calls": ("pythonic", "[now(), ad", Result("", [("now", "{}")])),
    "pythonic: cut off in a text": ("pythonic", "[add(a='x", Result("", [("add", '{"a": "x')])),
    "pythonic: text after the calls": ("pythonic", "[now()] or", Result("or", [("now", "{}")])),
    "pythonic: no literal": ("pythonic", "[add(a=open('x'))]", Result("", [("add", "{\"a\": open('x'))]")])),
    "pythonic: without a name": ("pythonic", "[add(1)]", Result("", [("add", "1)]")])),
    "pythonic: what JSON cannot write": (
        "pythonic",
        "[add(a=float, b=1)]",
        Result("", [("add", '{"a": float, b=1)]')]),
    ),
    "mistral: brackets": ("mistral", "a [TOOL] [TOOL_CALLS][]", Result("a [TOOL] [TOOL_CALLS][]", [])),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_text_and_what_is_a_call(case: str) -> None:
    form, text, expected = CASES[case]
    assert read(form, [text]) == expected
    assert read(form, text) == read_slowly(form, text) == expected  # one character after the other


# Pieces of which calls are made, in any order: nearly all of them malformed, at every point.
PARTS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "add", *"[]{},;: \n"]
PARTS += ['"name"', '"arguments"', '"add"', "{}", '{"a": 1}', '"\\u00e9"', "null", "-1.5e3", "<tool"]
PARTS += [
    "<function=add>",
    "</function>",
    "<parameter=a>",
    "</parameter>",
    "<|python_start|>",
    "[add(",
    "a=",
    "'x'",
    ")",
]
PARTS += [qwen(text="a"), Q2, "[add(a='x', b=[1]), now()]"]
PARTS += [H1, H2, L1, L2, M1, M2, f'{{"name": "add", "arguments": {A}']
texts = st.one_of(
    st.lists(st.sampled_from(PARTS), max_size=12).map("".join), st.text('<tool_cal>{}[]" ab:', max_size=20)
)
forms = st.sampled_from(get_args(ToolParserName))


@given(form=forms, text=texts, cuts=st.lists(st.integers(0, 200)))
def test_no_cut_changes_the_result_and_no_text_is_lost(form: ToolParserName, text: str, cuts: list[int]) -> None:
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    chunks = [text[i:j] for i, j in pairwise(bounds)]
    whole = read_slowly(form, text)
    assert read(form, chunks) == read(form, [text]) == whole
    if not whole.calls:
        assert whole.text == text
    said = "".join((whole.text, *(name + arguments for name, arguments in whole.calls)))
    assert is_subsequence(whole.text, text)
    if form not in ("pythonic", "qwen3_coder"):  # whose arguments become JSON
        assert len(said) <= len(text) + 2 * len(whole.calls)  # "{}" where a call has no arguments


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_any_json_is_passed_on_as_it_was_written(value: object) -> None:
    arguments = json.dumps({"value": value}, ensure_ascii=False)
    call = f'{{"name": "add", "arguments": {arguments}}}'
    for form, text in (
        ("hermes", f"<tool_call>{call}</tool_call>"),
        ("llama3_json", call),
        ("mistral", f"[TOOL_CALLS]add[ARGS]{arguments}"),
    ):
        assert read(form, [text]) == Result("", [("add", arguments)])  # type: ignore[arg-type]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
@example(QwenCoderParser.END_PARAMETER)
def test_any_json_comes_back_from_the_forms_that_are_not_json(value: object) -> None:
    kind = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
    schema = {"properties": {"a": {"type": kind.get(type(value), "null")}}}
    tool = Tool("add", schema)
    call = {"function": {"name": "add", "arguments": {"a": value}}}
    forms: list[ToolParserName] = ["pythonic"]
    if QwenCoderParser.END_PARAMETER not in json.dumps(value):  # which ends a value wherever it stands
        forms.append("qwen3_coder")
    for form in forms:
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        written = with_tools([message], [tool.for_template()], form)[1]["content"]
        parser = parser_for(form, ToolUse((tool,)))
        text, [(name, arguments)] = joined([*parser.push(written), *parser.finish()])
        assert (text, name, json.loads(arguments)) == ("", "add", {"a": value})


def test_arguments_come_while_they_are_written_and_plain_text_at_once() -> None:
    parser = parser_for("hermes", USE)
    assert list(parser.push("Hello <to")) == ["Hello"]
    assert list(parser.push("day")) == [" <today"]
    assert list(parser.push('<tool_call>{"name": "add", "argu')) == []
    begun, first = parser.push('ments": {"a"')
    assert isinstance(begun, ToolCallDelta)
    assert (begun.index, begun.name, begun.arguments) == (0, "add", "")
    assert first == ToolCallDelta(0, None, None, '{"a"')
    assert list(parser.push(": 1")) == [ToolCallDelta(0, None, None, ": 1")]


def is_subsequence(short: str, long: str) -> bool:
    rest = iter(long)
    return all(c in rest for c in short)


TOOL = Tool("add", {"type": "object"}, "Adds ü.").for_template()
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": "ü"}}}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "Well.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
    {"role": "tool", "content": "3", "tool_call_id": "d"},
    {"role": "assistant", "content": "2 or 3"},
]


def test_messages_become_text_of_the_roles_that_every_template_knows() -> None:
    system, user, call, results, answer = with_tools(CHAT, [TOOL], "hermes")
    assert system["content"].startswith("Be brief.\n\n# Tools")
    assert '\n{"type": "function", "function": {"name": "add", "description": "Adds ü.", ' in system["content"]
    assert (user, answer) == (CHAT[1], CHAT[5])
    written = '<tool_call>\n{"name": "add", "arguments": {"a": "ü"}}\n</tool_call>'
    assert call == {"role": "assistant", "content": f"Well.\n{written}\n{written}"}
    results_text = "<tool_response>\n2\n</tool_response>\n<tool_response>\n3\n</tool_response>"
    assert results == {"role": "user", "content": results_text}
    assert with_tools(CHAT[1:2], [TOOL], "hermes")[0]["role"] == "system"
    assert CHAT[2]["content"] == "Well."  # the request's own messages stay as they are


@pytest.mark.parametrize("form", get_args(ToolParserName))
def test_the_parser_reads_the_form_in_which_calls_are_written(form: ToolParserName) -> None:
    message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    written = with_tools([message], [TOOL], form)[1]["content"]
    begun, *rest = parser_for(form, ToolUse((Tool("add", {}),))).push(written)
    assert isinstance(begun, ToolCallDelta)
    assert begun.name == "add"
    assert "".join(d.arguments for d in rest if isinstance(d, ToolCallDelta)) == '{"a": "ü"}'


def test_texts_in_other_forms_come_while_they_are_written() -> None:
    parser = parser_for("qwen3_coder", USE)
    begun, opened = parser.push("<tool_call>\n<function=put>\n<parameter=text>\n")
    assert (begun, opened) == (replace(begun, name="put", arguments=""), ToolCallDelta(0, None, None, '{"text": "'))  # type: ignore[type-var]
    assert list(parser.push("one\ntwo")) == [ToolCallDelta(0, None, None, "one\\ntwo")]
    assert list(parser.push("\n</para")) == []
    assert list(parser.push("graph")) == [ToolCallDelta(0, None, None, "\\n</paragraph")]
    parser = parser_for("pythonic", USE)
    parser.push("[add(a='")
    assert list(parser.push("one two")) == [ToolCallDelta(0, None, None, "one two")]
    assert list(parser.push("\\")) == []
    assert list(parser.push("n'")) == [ToolCallDelta(0, None, None, "\\n")]


@pytest.mark.parametrize(
    "schema", [{"type": 5}, {"anyOf": 1}, {"$ref": "#/a"}, {"enum": []}, {"allOf": [{}, 3]}, True, 7]
)
def test_a_schema_of_any_form_has_types(schema: Any) -> None:
    use = ToolUse((Tool("put", {"properties": {"any": schema}}), Tool("add", {"properties": schema})))
    parser = parser_for("qwen3_coder", use)
    pieces = [*parser.push(qwen(any="x")), *parser.push(qwen(any="x").replace("put", "add")), *parser.finish()]
    assert joined(pieces).calls == [("put", '{"any": "x"}'), ("add", '{"any": "x"}')]


def test_a_call_of_any_depth_and_length_ends() -> None:
    deep = "[add(a=" + "[" * 10_000
    assert read("pythonic", [deep]).calls[0][1].startswith('{"a": [[[')
    assert read("pythonic", ["[add(a=" + "1" * 5000 + ")]"]).calls[0][0] == "add"
    assert read("qwen3_coder", ["<tool_call><function=put>" + "<>" * 50_000]).calls == [("put", "")]


@pytest.mark.parametrize(
    ("added", "template", "form"),
    [
        (["<tool_call>"], QWEN_CODER, "qwen3_coder"),
        (["<tool_call>"], QWEN, "hermes"),
        (["<|python_tag|>"], PYTHONIC, "pythonic"),
        (["<|python_tag|>"], LLAMA, "llama3_json"),
        (["[TOOL_CALLS]"], MISTRAL, "mistral"),
        ([], "", "hermes"),
        ([], "<function=name>{}</function>", "hermes"),  # Llama 3.1's other form, which is JSON
    ],
)
def test_the_form_is_found_in_the_template(added: list[str], template: str, form: str) -> None:
    assert detect(added, template) == form
