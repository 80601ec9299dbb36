"""Tools as a prompt and a constraint on the answer.

Grammars are llguidance's (docs/syntax.md, "Tool calling"). JSON is written as Python's `json.dumps` and Jinja's
`tojson` write it, which is what models have seen: a colon or comma and one space.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loray.errors import RequestError
from loray.spec import Constraint, Tool, ToolParserName, ToolUse
from loray.text.tools.parsers import HermesParser, LlamaParser, MistralParser

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TEXT = r"TEXT: /(.|\n)*/"
_COMBINING = {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "patternProperties", "unevaluatedProperties"}
_BY_NAME = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}  # name → schema
_VALUES = {"const", "dependentRequired", "enum", "required"}
_WORDS = {"$comment", "default", "description", "examples", "title"}
Symbol = Callable[[str], str]  # a marker as llguidance has it: the token where the tokenizer has one, else its text


def calls_constraint(
    use: ToolUse, form: ToolParserName, token_id: Callable[[str], int | None], answer: Constraint | None = None
) -> Constraint | None:
    """The constraint of the answer; None where the model is free. `answer` is that of an answer which calls nothing.

    Forced calls have arguments that are valid by the function's parameters, as far as its schema can be enforced; those
    of a strict function always are, or the schema is refused.
    """
    if not use.forced and answer is None and use.num_calls is None and not any(t.strict for t in use.callable):
        return None

    def symbol(marker: str) -> str:
        token = token_id(marker)
        return json.dumps(marker) if token is None else f"<[{token}]>"

    rules = _Rules(use, symbol)
    if form == "llama3_json":
        return Constraint.from_grammar(rules.llama(answer))
    if form == "hermes":
        body = rules.hermes_body()
    else:
        body = rules.mistral_body(named=token_id(MistralParser.ARGUMENTS) is not None)
    begin = HermesParser.BEGIN if form == "hermes" else MistralParser.BEGIN
    return Constraint.from_grammar(rules.marked(begin, body, answer, is_token=token_id(begin) is not None))


class _Rules:
    def __init__(self, use: ToolUse, symbol: Symbol) -> None:
        self._use, self._symbol = use, symbol
        self._rules: list[str] = []

    def hermes_body(self) -> str:
        calls = self._calls(lambda t: f'\n{{"name": {json.dumps(t.name)}, "arguments": ', "}\n")
        return f"({calls}) {self._symbol(HermesParser.END)}"

    def mistral_body(self, *, named: bool) -> str:
        if named:
            arguments = self._symbol(MistralParser.ARGUMENTS)
            for i, tool in enumerate(self._use.callable):
                self._rules.append(f"f{i}: {json.dumps(tool.name)} {arguments} %json {self._schema(tool)}")
            return f"({self._any()})"
        calls = self._calls(lambda t: f'{{"name": {json.dumps(t.name)}, "arguments": ', "}")
        more = "" if self._use.num_calls == 1 else f' (", " ({calls}))*'
        return f'" "? "[" ({calls}){more} "]"'

    def marked(self, begin: str, body: str, answer: Constraint | None, *, is_token: bool) -> str:
        """Calls that begin with a marker, each with its own."""
        marker, single = self._symbol(begin), self._use.num_calls == 1
        self._rules.append(f"call: {marker} {body}")
        calls = "call" if single else 'call ("\\n"? call)*'
        if self._use.forced:
            return self._lark(calls)
        if answer is not None:
            return self._lark(f"{calls} | answer", f"answer: %json {_answer_schema(answer)}")
        head = [f"head: TEXT {marker}"] if is_token else [f"head[lazy]: TEXT {marker}"]
        start = "said | rest" if single else "said* rest"
        return self._lark(start, *head, f"said: head {body}", "rest: TEXT", _TEXT)

    def llama(self, answer: Constraint | None) -> str:
        calls = self._calls(lambda t: f'{{"name": {json.dumps(t.name)}, "parameters": ', "}")
        more = "" if self._use.num_calls == 1 else f' ("; " ({calls}))*'
        self._rules.append(f"calls: ({calls}){more}")
        if self._use.forced:
            return self._lark("calls")
        tag = self._symbol(LlamaParser.BEGIN)
        if answer is not None:  # the tag tells calls from an answer: both are objects, and the lexer does not go back
            return self._lark(f"{tag} calls | answer", f"answer: %json {_answer_schema(answer)}")
        return self._lark(f"{tag}? calls | rest", "rest: TEXT?", r"TEXT: /[^{\s](.|\n)*/")

    def _calls(self, before: Callable[[Tool], str], after: str) -> str:
        """One rule for each function, and the choice between them."""
        for i, tool in enumerate(self._use.callable):
            self._rules.append(f"f{i}: {json.dumps(before(tool))} %json {self._schema(tool)} {json.dumps(after)}")
        return self._any()

    def _any(self) -> str:
        return " | ".join(f"f{i}" for i in range(len(self._use.callable)))

    def _schema(self, tool: Tool) -> str:
        """The schema of a function's arguments, an object. A free answer is held to the schemas of strict functions."""
        if not (self._use.forced or tool.strict):
            return _schema({"type": "object"}, lenient=True)
        defaults: dict[str, Any] = {"type": "object"}
        if "properties" in tool.parameters and not _COMBINING & tool.parameters.keys():
            defaults["additionalProperties"] = False  # a function has the parameters that it names
        return _schema({**defaults, **tool.parameters}, lenient=not tool.strict)

    def _lark(self, start: str, *rules: str) -> str:
        return "\n".join((f"start: {start}", *rules, *self._rules))


def _schema(schema: Mapping[str, Any], *, lenient: bool) -> str:
    return json.dumps({**_without_words(schema), "x-guidance": {**_JSON, "lenient": lenient}})


def _without_words(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema without what is written for readers: a grammar may have so many characters and brackets."""
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, dict):
            out[key] = {name: _part(part) for name, part in value.items()}
        elif key in _VALUES:
            out[key] = value
        elif key not in _WORDS:
            out[key] = [_part(part) for part in value] if isinstance(value, list) else _part(value)
    return out


def _part(value: Any) -> Any:
    return _without_words(value) if isinstance(value, dict) else value


def _answer_schema(answer: Constraint) -> str:
    if answer.kind != "json_schema":
        raise RequestError("tools can be combined with a JSON schema for the answer, not with other grammars", "tools")
    return _schema(json.loads(answer.text), lenient=answer.lenient)


# -- tools as text ----------------------------------------------------------------------------------------------------

_FORMS: Mapping[ToolParserName, tuple[str, str, str]] = {  # before the object, the arguments' key, after the object
    "hermes": ("<tool_call>\n", "arguments", "\n</tool_call>"),
    "llama3_json": ("", "parameters", ""),
    "mistral": ("[TOOL_CALLS][", "arguments", "]"),
}
# The form is that of https://github.com/NousResearch/Hermes-Function-Calling; the words are ours.
_SYSTEM = """# Tools

You can call functions. Each line between <tools> and </tools> describes one of them, with the JSON schema of its \
parameters:
<tools>
{tools}
</tools>

If a function helps to answer, call it instead of answering. A call has this form and nothing around it:
{call}
Its result comes in the next message, between <tool_response> and </tool_response>."""
Message = Mapping[str, Any]


def with_tools(messages: Sequence[Message], tools: Sequence[Message], form: ToolParserName) -> list[dict[str, Any]]:
    """The messages with nothing in them but text: the tools are described in the system message, calls and results are
    text of the assistant and the user.
    """
    example = _written("<name of the function>", "{<name of an argument>: <its value>, ...}", form)
    system = _SYSTEM.format(tools="\n".join(_json(tool) for tool in tools), call=example)
    out: list[dict[str, Any]] = []
    before = None
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if before == "tool":
                out[-1]["content"] += f"\n{result}"
            else:
                out.append({"role": "user", "content": result})
        else:
            out.append(_plain(message, form))
        before = message["role"]
    if out and out[0]["role"] == "system":
        out[0]["content"] = f"{out[0]['content']}\n\n{system}"
    else:
        out.insert(0, {"role": "system", "content": system})
    return out


def _plain(message: Message, form: ToolParserName) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    written = [_written(c["name"], c["arguments"], form) for c in calls]
    texts = [message["content"], *written] if message["content"] else written or [""]
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": "\n".join(texts)}


def _written(name: str, arguments: Any, form: ToolParserName) -> str:
    """A call. `arguments`: an object, or JSON as text."""
    before, key, after = _FORMS[form]
    text = arguments if isinstance(arguments, str) else _json(arguments)
    return f'{before}{{"name": {_json(name)}, "{key}": {text}}}{after}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
