"""Tools as a prompt and a constraint on the answer.

Grammars are llguidance's (docs/syntax.md, "Tool calling"). JSON is written as Python's `json.dumps` and Jinja's
`tojson` write it, which is what models have seen: a colon or comma and one space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from loray.errors import RequestError
from loray.spec import Constraint, Tool, ToolParserName, ToolUse
from loray.text.tools.parsers import HermesParser, LlamaParser, MistralParser, QwenCoderParser
from loray.text.tools.schemas import properties_of, resolved, types_of

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
    match form:
        case "llama3_json":
            return Constraint.from_grammar(rules.llama(answer))
        case "pythonic":
            return Constraint.from_grammar(rules.pythonic(answer))
        case "hermes":
            begin, body = HermesParser.BEGIN, rules.hermes_body()
        case "qwen3_coder":
            begin, body = QwenCoderParser.BEGIN, rules.qwen_coder_body()
        case "mistral":
            begin = MistralParser.BEGIN
            body = rules.mistral_body(named=token_id(MistralParser.ARGUMENTS) is not None)
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

    def qwen_coder_body(self) -> str:
        for i, tool in enumerate(self._use.callable):
            parameters = self._parameters(tool, r"[^>\n]+")
            for j, (name, schema, _) in enumerate(parameters or ()):
                value = self._raw_value(tool, schema, f"f{i}_p{j}")
                self._rules.append(f"f{i}_p{j}: {json.dumps(f'<parameter={name}>{_NL}')} ({value}) {_NEWLINE}")
            written = [f"f{i}_p{j}{'' if given[2] else '?'}" for j, given in enumerate(parameters or ())]
            body = "raw_parameter*" if parameters is None else " ".join(written)
            head = json.dumps(f"{_NL}<function={tool.name}>{_NL}")
            self._rules.append(f'f{i}: {head} {body} "</function>\\n"')
        self._rules += _RAW
        return f"({self._any()}) {self._symbol(QwenCoderParser.END)}"

    def _raw_value(self, tool: Tool, schema: Any, rule: str, *, is_alone: bool = True) -> str:
        """A value of `schema` up to its end marker: a text as it stands, or JSON. `rule` begins the names of rules that
        it needs; `is_alone`: no other type may stand there, for which a text could be taken.
        """
        schema = resolved(schema, tool.parameters)
        types = types_of(schema, tool.parameters)
        own: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
        keys = own.keys() - _WORDS
        if "enum" in keys or "const" in keys:
            given = own.get("enum")
            values = given if isinstance(given, list) else [own.get("const")]
            texts = (value if isinstance(value, str) else json.dumps(value) for value in values)
            return " | ".join(json.dumps(text + _END) for text in texts)
        if "string" not in types:
            json_schema = _schema(_with_definitions(schema, tool), lenient=not tool.strict)
            return f"%json {json_schema} {json.dumps(_END)}"
        parts: list[Any] = []
        if keys in ({"anyOf"}, {"oneOf"}):
            parts = own[next(iter(keys))]
        elif isinstance(own.get("type"), list):
            parts = [{**own, "type": kind} for kind in own["type"]]
        if parts and is_alone:
            return " | ".join(self._raw_value(tool, o, f"{rule}_{k}", is_alone=False) for k, o in enumerate(parts))
        if tool.strict and (odd := sorted(keys - _OF_TEXTS - _OF_OTHER_TYPES)):
            raise _not_enforced(f"{odd[0]!r} of a parameter", tool)
        if is_alone and not keys & {"minLength", "maxLength"}:
            return "raw_text"
        first, last = (own.get(key) if isinstance(own.get(key), int) else "" for key in ("minLength", "maxLength"))
        other = "" if is_alone else " & ~RAW_JSON"
        self._rules.append(f"{rule.upper()}: RAW & /(.|\\n){{{first or 0},{last}}}/{other}")
        self._rules.append(f"{rule}_text[lazy]: {rule.upper()} {json.dumps(_END)}")
        return f"{rule}_text"

    def pythonic(self, answer: Constraint | None) -> str:
        for i, tool in enumerate(self._use.callable):
            parameters = self._parameters(tool, r"""[^=(),\[\]{}'"\s]+""")
            if parameters is None:
                self._rules.append(f'f{i}: {json.dumps(f"{tool.name}(")} (py_argument (", " py_argument)*)? ")"')
                continue
            names = [f"f{i}_p{j}" for j in range(len(parameters))]
            for j, (name, schema, is_required) in enumerate(parameters):
                own = _schema(_with_definitions(schema, tool), lenient=not tool.strict)
                is_flag = _part(resolved(schema, tool.parameters)) == {"type": "boolean"}
                value = '("True" | "False")' if is_flag else f"%json {own}"
                is_last = j == len(names) - 1
                behind = "" if is_last else f"f{i}_rest{j + 1}"
                others = "" if is_required or is_last else f" | f{i}_first{j + 1}"
                self._rules += [
                    f"{names[j]}: {json.dumps(f'{name}=')} {value}",
                    f"f{i}_first{j}: {names[j]} {behind}{others}",  # no parameter has been written
                    f'f{i}_rest{j}: (", " {names[j]}){"" if is_required else "?"} {behind}',
                ]
            may_be_empty = not any(is_required for *_, is_required in parameters)
            body = "" if not parameters else f"f{i}_first0{'?' if may_be_empty else ''}"
            self._rules.append(f'f{i}: {json.dumps(f"{tool.name}(")} {body} ")"')
        self._rules += _PYTHON
        more = "" if self._use.num_calls == 1 else f' (", " ({self._any()}))*'
        calls = f'"[" ({self._any()}){more} "]"'
        if self._use.forced:
            return self._lark(calls)
        if answer is not None:
            return self._lark(f"{calls} | answer", f"answer: %json {_answer_schema(answer)}")
        return self._lark(f"{calls} | rest", "rest: TEXT?", r"TEXT: /[^\[\s](.|\n)*/")

    def _parameters(self, tool: Tool, name: str) -> list[tuple[str, Any, bool]] | None:
        """The parameters of a function that are written one by one, in the schema's order: name, schema, and whether it
        must be there; None: any are. Raises RequestError where a strict function's schema says more of them, or one has
        a name that does not match `name`.
        """
        if not (self._use.forced or tool.strict):
            return None
        schema = resolved(tool.parameters, tool.parameters)
        if not isinstance(schema, Mapping):
            return None
        properties = properties_of(tool.parameters)
        if unknown := [key for key in properties if re.fullmatch(name, key) is None]:
            raise _not_enforced(f"the parameter's name {unknown[0]!r}", tool)
        odd = sorted(schema.keys() - _OF_PARAMETERS - _WORDS - {"$schema", "x-guidance"})
        if tool.strict and (odd or schema.get("additionalProperties") not in (None, False)):
            raise _not_enforced(f"{odd[0] if odd else 'additionalProperties'!r} of its parameters", tool)
        if not properties and schema.get("additionalProperties") is not False:
            return None
        required = schema.get("required")
        return [(key, own, isinstance(required, list) and key in required) for key, own in properties.items()]

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


_NL, _NEWLINE, _END = "\n", r'"\n"', "\n</parameter>"
_OF_TEXTS = {"type", "minLength", "maxLength"}
_OF_OTHER_TYPES = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "items", "minItems"}
_OF_OTHER_TYPES |= {"maxItems", "prefixItems", "properties", "required", "additionalProperties"}
_OF_PARAMETERS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
_RAW = (
    'raw_parameter: "<parameter=" RAW_NAME ">\\n" raw_text "\\n"',
    f"raw_text[lazy]: RAW {json.dumps(_END)}",
    r"RAW_NAME: /[^>\n]+/",
    r"RAW: /(.|\n)*/ & ~/(.|\n)*<\/parameter>(.|\n)*/",
    # What would be read as JSON, where JSON may stand too.
    r"RAW_JSON: /\s*(-?[0-9][0-9.eE+-]*|true|false|null|True|False|None|[\[{](.|\n)*)\s*/",
)
_PYTHON = (
    'py_argument: PY_NAME "=" py_value',
    'py_value: PY_STRING | PY_NUMBER | "True" | "False" | "None" | py_list | py_dict',
    'py_list: "[" (py_value (", " py_value)*)? "]"',
    'py_dict: "{" (PY_STRING ": " py_value (", " PY_STRING ": " py_value)*)? "}"',
    r"PY_NAME: /[a-zA-Z_][a-zA-Z0-9_]*/",
    r"""PY_STRING: /"([^"\\\n]|\\["'\\nrt])*"|'([^'\\\n]|\\["'\\nrt])*'/""",
    r"PY_NUMBER: /-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/",
)


def _not_enforced(what: str, tool: Tool) -> RequestError:
    return RequestError(
        f"{tool.name}: {what} cannot be enforced in the form in which this model writes calls; leave it out, "
        "or `strict`",
        "tools",
    )


def _with_definitions(schema: Any, tool: Tool) -> dict[str, Any]:
    """A parameter's schema by itself."""
    own = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    return {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters} | own


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
_EXAMPLES: Mapping[ToolParserName, str] = {
    "pythonic": "[name_of_the_function(name_of_an_argument=its_value, ...), ...]",
    "qwen3_coder": "<tool_call>\n<function=name of the function>\n<parameter=name of an argument>\nits value\n"
    "</parameter>\n...\n</function>\n</tool_call>",
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
    arguments = "{<name of an argument>: <its value>, ...}"
    example = _EXAMPLES.get(form) or _written([("<name of the function>", arguments)], form)
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
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    texts = [text for text in (message["content"], _written(calls, form) if calls else "") if text]
    return {k: v for k, v in message.items() if k != "tool_calls"} | {"content": "\n".join(texts)}


def _written(calls: Sequence[tuple[str, Any]], form: ToolParserName) -> str:
    """Calls, each with its arguments: an object, or JSON as text."""
    match form:
        case "pythonic":
            return f"[{', '.join(_python_call(name, _object(arguments)) for name, arguments in calls)}]"
        case "qwen3_coder":
            return "\n".join(_raw_call(name, _object(arguments)) for name, arguments in calls)
    before, key, after = _FORMS[form]
    written = ((name, given if isinstance(given, str) else _json(given)) for name, given in calls)
    return "\n".join(f'{before}{{"name": {_json(name)}, "{key}": {text}}}{after}' for name, text in written)


def _object(arguments: Any) -> dict[str, Any]:
    """The arguments of an earlier call; none where they are no object."""
    with suppress(ValueError, RecursionError):
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return arguments if isinstance(arguments, dict) else {}


def _python_call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{key}={_python(value)}' for key, value in arguments.items())})"


def _python(value: Any) -> str:
    """A literal whose texts are in double quotes, as in JSON."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_json(key)}: {_python(own)}' for key, own in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_python, value))}]"
    return repr(value) if value is None or isinstance(value, bool) else _json(value)


def _raw_call(name: str, arguments: Mapping[str, Any]) -> str:
    texts = ((key, value if isinstance(value, str) else _json(value)) for key, value in arguments.items())
    body = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
