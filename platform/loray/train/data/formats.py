"""Formats of rows: what their columns are called, and what chats, or texts as they stand, a row stands for.

A format is an entry of `FORMATS`. Rows of all formats but `text` become chats in one way: messages as OpenAI's requests
have them, of which the assistant's are learned. Every failure is a ValueError that says what is wrong with the row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from loray.errors import DataError
from loray.spec import FORMAT_COLUMNS, OBJECTIVES, ColumnNames, DataFormat, DataSpec

Formats = frozenset[str]  # those that an objective learns from
Message = dict[str, Any]
Record = Mapping[str, Any]
Column = tuple[str, str]  # (its name here, its name in files)


class Chat(NamedTuple):
    """A conversation. `learned`: indices of the assistant's messages that the model learns to write."""

    messages: list[Message]
    learned: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None


class Turns(NamedTuple):
    """Messages that are not learned, and those after them, of which the assistant's are."""

    before: list[Message]
    learned: list[Message]


class RowFormat(NamedTuple):
    """A format says what its rows are.

    columns       those that every row has, by which the format is known
    optional      those that are read where a row has them
    turns         the conversations of a row; None: it is a text
    texts         the same as prompts and completions without a template; None: these rows have no such form
    is_pair       a row has two conversations, with the chosen answer and with the rejected one
    is_desirable  whether a row's answer is, where rows say it of single ones
    unwrapped     a row with the columns that the fields above read, where it has others
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    turns: Callable[[Record], Sequence[Turns]] | None = None
    texts: Callable[[Record], Sequence[tuple[str, str]]] | None = None
    is_pair: bool = False
    is_desirable: Callable[[Record], bool] | None = None
    unwrapped: Callable[[Record], Record] = dict


def chats(format: DataFormat, record: Record, system: str | None = None) -> list[Chat]:
    """Read the chats of a row: one, or two of a pair. `system`: the system prompt of a row without one."""
    turns, record = FORMATS[format].turns, FORMATS[format].unwrapped(record)
    assert turns is not None, format
    tools, prompt = _tools(record.get("tools")), record.get("system") or system
    return [_chat(found, None if prompt is None else text_of(prompt, "system"), tools) for found in turns(record)]


def _chat(turns: Turns, system: str | None, tools: list[dict[str, Any]] | None) -> Chat:
    messages = [*turns.before, *turns.learned]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    first = len(messages) - len(turns.learned)
    is_learned = [_pop_learned(message) for message in messages]
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistants or assistants[-1] < first:
        raise ValueError("the conversation has no assistant turn to learn from")
    if assistants[0] == 0:
        raise ValueError("the conversation starts with the assistant; put a user or system message first")
    return Chat(messages, tuple(i for i in assistants if i >= first and is_learned[i]), tools)


def _pop_learned(message: Message) -> bool:
    """Take `train` (a truth value) and OpenAI's `weight` (0 or 1) from a message, which say whether it is learned."""
    train, weight = message.pop("train", None), message.pop("weight", None)
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"a message's `train` must be true or false, not {train!r}")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"a message's `weight` must be 0 or 1, not {weight!r}")
    if message["role"] != "assistant" and (train or weight):
        raise ValueError(f"only the assistant's messages are learned, and one of the {message['role']} asks to be")
    return train is not False and (weight is None or bool(weight))


# -- formats ----------------------------------------------------------------------------------------------------------

_CHAT = ("system", "tools")
# Of Stanford's Alpaca (https://github.com/tatsu-lab/stanford_alpaca), which its rows have been trained with everywhere.
_ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_ALPACA_INPUT = ", paired with an input that provides further context"
_SPEAKERS = {  # of ShareGPT's `from`
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}


def _messages_turns(record: Record) -> Sequence[Turns]:
    return [Turns([], messages_of(record.get("messages"), "messages"))]


def _sharegpt_turns(record: Record) -> Sequence[Turns]:
    """Turns of the assistant before the first of a person, which many of these rows begin with, are left out."""
    messages = messages_of(record.get("conversations"), "conversations")
    first = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant")), 0)
    return [Turns([], [m for i, m in enumerate(messages) if i >= first or m["role"] == "system"])]


def _prompt_turns(record: Record) -> Sequence[Turns]:
    return [Turns(_prompt(record.get("prompt")), _side(record.get("completion"), "completion", "assistant"))]


def _prompt_texts(record: Record) -> Sequence[tuple[str, str]]:
    return [(text_of(record.get("prompt"), "prompt"), text_of(record.get("completion"), "completion"))]


def _alpaca_turns(record: Record) -> Sequence[Turns]:
    """The input follows the instruction, after an empty line."""
    asked = [text_of(record.get("instruction"), "instruction"), text_of(record.get("input") or "", "input")]
    answer = _side(record.get("output"), "output", "assistant")
    return [Turns([{"role": "user", "content": "\n\n".join(filter(None, asked))}], answer)]


def _alpaca_texts(record: Record) -> Sequence[tuple[str, str]]:
    given = text_of(record.get("input") or "", "input")
    prompt = _ALPACA.format(
        instruction=text_of(record.get("instruction"), "instruction"),
        with_input=_ALPACA_INPUT if given else "",
        input=f"### Input:\n{given}\n\n" if given else "",
    )
    return [(prompt, text_of(record.get("output"), "output"))]


def _pair_turns(record: Record) -> Sequence[Turns]:
    """Both answers to one prompt. As lists of messages they may begin with it, and then it need not be given."""
    answers = [_side(record.get(name), name, "assistant") for name in _ANSWERS]
    if record.get("prompt") is not None:
        prompt = _prompt(record["prompt"])
    else:
        prompt = answers[0][:-1]
        if not prompt:
            raise ValueError("`prompt` is missing: give it, or put its messages before both answers")
    found = []
    for name, answer in zip(_ANSWERS, answers, strict=True):
        said = answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer
        if [message["role"] for message in said] != ["assistant"]:
            raise ValueError(f"`{name}` must be one assistant message: put the turns before it into `prompt`")
        found.append(Turns([dict(message) for message in prompt], [dict(message) for message in said]))
    return found


def _pair_texts(record: Record) -> Sequence[tuple[str, str]]:
    prompt = text_of(record.get("prompt"), "prompt")
    return [(prompt, text_of(record.get(name), name)) for name in _ANSWERS]


def _openai_pair(record: Record) -> Record:
    """Read a row of OpenAI's fine-tuning by preferences: `input` has the messages and tools of both answers."""
    given, answers = _from_json(record.get("input"), "input"), ("preferred_output", "non_preferred_output")
    if not isinstance(given, dict):
        raise ValueError("`input` must be an object with the `messages` of the prompt, and `tools` where there are any")
    read = {name: messages_of(record.get(answer), answer) for name, answer in zip(_ANSWERS, answers, strict=True)}
    return {"prompt": messages_of(given.get("messages"), "input.messages"), "tools": given.get("tools"), **read}


def _single_turns(record: Record) -> Sequence[Turns]:
    (found,) = _prompt_turns(record)
    if [message["role"] for message in found.learned] != ["assistant"]:
        raise ValueError("`completion` must be one assistant message: put the turns before it into `prompt`")
    return [found]


def _label(record: Record) -> bool:
    """CSV has words."""
    found = record.get("label")
    found = {"true": True, "false": False}.get(found.lower(), found) if isinstance(found, str) else found
    if not isinstance(found, bool):
        raise ValueError(f"`label` must be true, where the answer is desirable, or false, not {found!r}")
    return found


_ANSWERS = ("chosen", "rejected")
# In the order in which `auto` looks for them: rows of Alpaca often have a `text` too.
FORMATS: Mapping[DataFormat, RowFormat] = {
    "chat": RowFormat(FORMAT_COLUMNS["chat"], _CHAT, _messages_turns),
    "sharegpt": RowFormat(FORMAT_COLUMNS["sharegpt"], _CHAT, _sharegpt_turns),
    "prompt_completion": RowFormat(FORMAT_COLUMNS["prompt_completion"], _CHAT, _prompt_turns, _prompt_texts),
    "alpaca": RowFormat(FORMAT_COLUMNS["alpaca"], ("input", *_CHAT), _alpaca_turns, _alpaca_texts),
    "text": RowFormat(FORMAT_COLUMNS["text"]),
    "preference": RowFormat(FORMAT_COLUMNS["preference"], ("prompt", *_CHAT), _pair_turns, _pair_texts, is_pair=True),
    "openai_preference": RowFormat(
        FORMAT_COLUMNS["openai_preference"], (), _pair_turns, is_pair=True, unwrapped=_openai_pair
    ),
    "unpaired_preference": RowFormat(
        FORMAT_COLUMNS["unpaired_preference"], _CHAT, _single_turns, _prompt_texts, is_desirable=_label
    ),
}


def fitting_formats(names: Sequence[str], spec: DataSpec, formats: Formats) -> list[DataFormat]:
    """List those of `formats` that rows with columns `names` may have."""
    return [
        name
        for name, format in FORMATS.items()
        if name in formats and all(file_column(column, names, spec.columns) in names for column in format.columns)
    ]


def detect(source: object, names: Sequence[str], spec: DataSpec, formats: Formats) -> DataFormat:
    """Find the format of rows with columns `names`, which a recipe's data is to have, of `formats`. Raises DataError.

    If several fit, it is the first of `FORMATS`.
    """
    fitting = fitting_formats(names, spec, formats)
    has = f"{source} has columns {', '.join(names) or '(none)'}"
    if spec.format != "auto" and spec.format != "raw":
        if spec.format not in fitting:
            wanted = " and ".join(f"`{column}`" for column in FORMATS[spec.format].columns)
            raise DataError(
                f"{has}, but data.format {spec.format} needs {wanted}; set data.format to auto, or name the columns in "
                "data.columns"
            )
        return spec.format
    if not fitting:
        read = (f"{' and '.join(f'`{c}`' for c in FORMATS[n].columns)} ({n})" for n in FORMATS if n in formats)
        others = [name for name, objective in OBJECTIVES.items() if fitting_formats(names, spec, objective.formats)]
        hint = f"; these are for objective.type {' or '.join(others)}" if others else _EXPECTED_COLUMNS
        raise DataError(f"{has}; loray reads {', '.join(read)}{hint}")
    if spec.format == "auto":
        return fitting[0]
    plain = [name for name in fitting if FORMATS[name].texts is not None or FORMATS[name].turns is None]
    if not plain:
        raise DataError(f"{has}: data.format raw learns strings as they stand, and these are chats; set it to auto")
    return plain[0]


_EXPECTED_COLUMNS = "; data.columns says what yours are called, as {prompt: question, completion: answer}"


def columns_of(format: DataFormat, names: Sequence[str], spec: DataSpec, *, are_all: bool) -> tuple[Column, ...]:
    """List the columns that rows of a format are read from. `names`: those of all rows, or else of the first."""
    known = (*FORMATS[format].columns, *FORMATS[format].optional)
    found = [(name, file_column(name, names, spec.columns)) for name in known]
    return tuple(column for column in found if not are_all or column[1] in names)


def file_column(name: str, names: Sequence[str], columns: ColumnNames | None) -> str:
    """Return a file's name of a column: that of `columns`, or the one here where a file has only that."""
    other = name if columns is None else columns.of(name)
    return name if other not in names and name in names else other


# -- messages ---------------------------------------------------------------------------------------------------------


def text_of(given: Any, name: str) -> str:
    """Check that a value is a text."""
    if not isinstance(given, str):
        raise ValueError(f"`{name}` must be a string, not {type(given).__name__}")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` holds half of a surrogate pair, which is no text") from None
    return given


def messages_of(given: Any, name: str) -> list[Message]:
    """Read a list of messages, or the same as JSON. Their fields are OpenAI's, or ShareGPT's `from` and `value`."""
    given = _from_json(given, name)
    if not isinstance(given, list) or not given:
        raise ValueError(f"`{name}` must be a list of at least one message")
    return [_message(message) for message in given]


def _prompt(given: Any) -> list[Message]:
    prompt = _side(given, "prompt", "user")
    if prompt[-1]["role"] == "assistant":
        raise ValueError("`prompt` must end before the answer, not with an assistant message")
    return prompt


def _side(given: Any, name: str, role: str) -> list[Message]:
    """A text is one message of `role`."""
    if isinstance(given, list):
        return messages_of(given, name)
    if not isinstance(given, str):
        raise ValueError(f"`{name}` must be a string or a list of messages, not {type(given).__name__}")
    return [{"role": role, "content": text_of(given, name)}]


def _message(given: Any) -> Message:
    """Leave out fields that are null, which tables have wherever another row has a value."""
    message = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    if "from" in message and "role" not in message:
        message = _spoken(message)
    if not isinstance(message.get("role"), str):
        raise ValueError("every message needs a `role`, as user or assistant, and `content`")
    if message["role"] == "developer":  # OpenAI's newer name
        message["role"] = "system"
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_call(call) for call in _list(calls, "tool_calls")]
    content = message.get("content", "" if calls else None)
    message["content"] = content if isinstance(content, str) else _text(content)
    text_of(message["content"], "content")
    return message


def _spoken(message: Message) -> Message:
    """A message of ShareGPT, as one of OpenAI."""
    speaker, said = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str):
        raise ValueError("every one of `conversations` needs `from`, as human or gpt, and `value`")
    message |= {"role": _SPEAKERS.get(speaker, speaker)}
    if speaker == "function_call":
        call = _from_json(said, "value")
        return message | {"tool_calls": call if isinstance(call, list) else [call]}
    return message | {"content": said}


def _text(parts: Any) -> str:
    """Text parts are joined by newlines, as the server joins them."""
    given = [part.get("text") if isinstance(part, dict) else part for part in parts] if isinstance(parts, list) else []
    texts = [text for text in given if isinstance(text, str)]
    if not texts or len(texts) < len(given):
        raise ValueError("a message's `content` must be a string or a list of text parts")
    return "\n".join(texts)


def _call(given: Any) -> dict[str, Any]:
    """A tool call with its arguments as an object, which most templates expect. What is not JSON stays a text."""
    function = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('every one of `tool_calls` needs {"function": {"name": …, "arguments": …}}')
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        with suppress(ValueError):
            arguments = json.loads(arguments)
    call = {name: value for name, value in given.items() if value is not None and name not in ("name", "arguments")}
    return {"type": "function", **call, "function": {"name": function["name"], "arguments": arguments}}


def _tools(given: Any) -> list[dict[str, Any]] | None:
    """The tools that a chat offers: a list, or the same as JSON, which tables need where parameters differ."""
    given = _from_json(given, "tools")
    if not given:
        return None
    tools = _list(given, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of objects, as in a request")
    return tools


def _from_json(given: Any, name: str) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given) if given else None
    except ValueError as e:
        raise ValueError(f"`{name}` is a string that is not JSON: {e}") from e


def _list(given: Any, name: str) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(f"`{name}` must be a list, not {type(given).__name__}")
    return given
