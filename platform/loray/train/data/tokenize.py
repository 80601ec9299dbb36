"""Tokenises rows: token ids with targets, the tokens that the model learns to predict.

chat               targets are assistant turns, rendered with the checkpoint's own chat template
prompt_completion  targets are the completion and the end-of-sequence token
text               all tokens are targets; an end-of-sequence token is added
preference         two examples a row, with the chosen answer and with the rejected one: completions, or chats

A shard has every example whole: rows are cut out of it later. A server tokenises a prompt whole, so a chat is tokenised
whole too, and the answers are found by their characters. Cut into segments, SentencePiece would begin each with a space
that no prompt has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jinja2 import TemplateError
from numpy.lib.stride_tricks import sliding_window_view

from loray.errors import DataError
from loray.train.data.read import BadRow, Content, DataFormat, FilePart, records_of
from loray.train.data.shards import ShardIndex, TokenShard

Message = Mapping[str, Any]
_PROBE = "\ue000"  # of the private use area: stands for an answer, to see what a template writes around it
_FAILURES = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class Conversation(NamedTuple):
    """`answers` are [start, stop) in characters: what the model learns to write."""

    text: str
    answers: tuple[tuple[int, int], ...]


class _Turn(NamedTuple):
    """A conversation up to the end of one answer, which begins at `start`."""

    text: str
    start: int


def conversations(record: Mapping[str, Any], tokenizer: Any, *, apart: bool = False) -> list[Conversation]:
    """Render what the model learns from one chat. Raises ValueError, which says what is wrong with it.

    To find the answers, the chat is rendered up to each assistant turn; the result must be a prefix of the whole. A
    template that changes earlier turns (Qwen3 drops their reasoning) has no such prefixes: then every assistant turn
    becomes a conversation of its own, with the text that a server has at that point. So it does where turns are to be
    `apart`.
    """
    messages, tools = _messages(record.get("messages")), _tools(record.get("tools"))
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError("the conversation has no assistant turn to learn from")
    if turns[0] == 0:
        raise ValueError("the conversation starts with the assistant; put a user or system message first")
    template = _Template(tokenizer, tools)
    template.check(messages)
    found = [template.turn(messages[: i + 1]) for i in turns]
    spans = [(turn.start, _end(turn, tokenizer.eos_token)) for turn in found]
    whole = template.render(messages[: turns[-1] + 1])
    if not apart and all(whole.startswith(turn.text) for turn in found):
        return [Conversation(whole[: spans[-1][1]], tuple(spans))]
    return [Conversation(turn.text[: span[1]], (span,)) for turn, span in zip(found, spans, strict=True)]


def answered(record: Mapping[str, Any], answer: str, tokenizer: Any) -> Conversation:
    """Render the messages of `prompt` and the one of the column `answer`, which alone is learned. Raises ValueError."""
    prompt, turns = _messages(record.get("prompt"), "prompt"), _messages(record.get(answer), answer)
    if prompt[-1]["role"] == "assistant":
        raise ValueError("`prompt` must end before the answer, not with an assistant message")
    if [message["role"] for message in turns] != ["assistant"]:
        raise ValueError(f"`{answer}` must be one assistant message: put the turns before it into `prompt`")
    template = _Template(tokenizer, _tools(record.get("tools")))
    template.check([*prompt, *turns])
    turn = template.turn([*prompt, *turns])
    end = _end(turn, tokenizer.eos_token)
    return Conversation(turn.text[:end], ((turn.start, end),))


def _end(turn: _Turn, eos: str) -> int:
    """An answer ends with the end-of-sequence token: text that a template adds after it is never generated."""
    at = turn.text.rfind(eos, turn.start)
    return len(turn.text) if at < 0 else at + len(eos)


class _Template:
    """The template that a tokenizer has for chats with these tools."""

    def __init__(self, tokenizer: Any, tools: list[dict[str, Any]] | None) -> None:
        self._tokenizer, self._tools = tokenizer, tools

    def check(self, messages: Sequence[Message]) -> None:
        source = self._tokenizer.get_chat_template(tools=self._tools)
        calls = any("tool_calls" in message for message in messages)
        for name, is_used in (("tools", self._tools is not None), ("tool_calls", calls)):
            if is_used and name not in source:
                raise ValueError(f"the base's chat template does not know {name}: write them into the messages' text")

    def render(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        """Render messages; with `prompt` also what a server adds, after which the model answers."""
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=prompt
            )
        except _FAILURES as e:
            raise ValueError(f"the base's chat template refuses these messages: {e}") from e
        assert isinstance(text, str)
        return text

    def turn(self, messages: Sequence[Message]) -> _Turn:
        """Render a conversation up to its last message, which is the assistant's.

        Templates of reasoning models (R1's) open the reasoning in the prompt, and leave it out of a finished turn. An
        answer that begins with what the prompt has opened goes on from there, as a server's does; any other one is
        written as the template has it, and begins where prompt and turn part.
        """
        before, after = self.render(messages[:-1], prompt=True), self.render(messages)
        if after.startswith(before):
            return _Turn(after, len(before))
        probed = self.render([*messages[:-1], {**messages[-1], "content": _PROBE}])
        header = probed.partition(_PROBE)[0]
        is_opened = before.startswith(header) and after.startswith(header)
        if not is_opened or len(header) <= len(self.render(messages[:-1])):
            raise ValueError("the chat template renders an assistant turn differently from its generation prompt")
        opened, answer, eos = before[len(header) :], messages[-1]["content"], self._tokenizer.eos_token
        if answer.startswith(opened) and eos in after[len(header) :]:
            return _Turn(before + answer[len(opened) :] + eos, len(before))
        return _Turn(after, len(header))


# -- messages ---------------------------------------------------------------------------------------------------------


def _messages(given: Any, name: str = "messages") -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise ValueError(f"`{name}` must be a list of at least one message")
    return [_message(message) for message in given]


def _message(given: Any) -> dict[str, Any]:
    """Leave out fields that are null, which tables have wherever another row has a value."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise ValueError("every message needs a `role`, as user or assistant, and `content`")
    message = {name: value for name, value in given.items() if value is not None}
    if calls := message.pop("tool_calls", None):
        message["tool_calls"] = [_call(call) for call in _list(calls, "tool_calls")]
    content = message.get("content", "" if calls else None)
    message["content"] = content if isinstance(content, str) else _text(content)
    try:
        message["content"].encode()
    except UnicodeEncodeError:
        raise ValueError("`content` holds half of a surrogate pair, which is no text") from None
    return message


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
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as e:
            raise ValueError(f"`tools` is a string that is not JSON: {e}") from e
    if not given:
        return None
    tools = _list(given, "tools")
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("`tools` must be a list of objects, as in a request")
    return tools


def _list(given: Any, name: str) -> list[Any]:
    if not isinstance(given, list):
        raise ValueError(f"`{name}` must be a list, not {type(given).__name__}")
    return given


# -- examples ---------------------------------------------------------------------------------------------------------

_FORM = 1  # of shards: another one where the same content gives other tokens, or is written in another way
_TEXTS_AT_ONCE = 256  # documents per call of the tokenizer
_ANSWERS = ("chosen", "rejected")
_Records = Sequence[tuple[int, dict[str, Any]]]


class _Example(NamedTuple):
    """`runs` of None: every token is a target. `document` is the number of its row in the part."""

    ids: Sequence[int]
    document: int
    runs: Sequence[tuple[int, int]] | None = None


class Tokenisation:
    """Makes shards of parts. Raises DataError for a tokenizer that cannot do it.

    joined      texts are whole, without what the tokenizer puts before a text
    invocation  tokens from whose last occurrence in an example on it is learned, which every example must have; each
                answer of a chat is then an example of its own, since a server invokes the adapter for each
    """

    def __init__(self, tokenizer: Any, *, joined: bool, invocation: Sequence[int] | None = None) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer, self._joined = tokenizer, joined
        self._invocation = None if invocation is None else np.asarray(invocation)
        self._dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        self._digest = _digest_of(tokenizer)
        self.beginning: list[int] = prompt_ids(tokenizer, [""])[0] if joined else []

    def check_format(self, name: object, format: DataFormat) -> None:
        if format == "chat" and not self._tokenizer.chat_template:
            raise DataError(f"{name} holds chats, but the base model has no chat template; use prompt/completion")

    def key(self, part: FilePart) -> str:
        """Name the part's shard by all that its tokens depend on."""
        named = [_FORM, part.digest, part.file.format, part.file.format == "text" and self._joined, self._digest]
        if self._invocation is not None:
            named.append(self._invocation.tolist())
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def shard(self, content: Content) -> TokenShard:
        """Tokenise a part. Raises BadRow."""
        records = records_of(content)
        found = list(self._examples(content.format, records))
        if self._invocation is not None:
            found = [self._invoked(example, records) for example in found]
        runs = [example.runs or () for example in found]
        flat = [run for of_example in runs for run in of_example]
        index = ShardIndex(
            lengths_E=np.array([len(example.ids) for example in found], np.int32),
            documents_E=np.array([example.document for example in found], np.int32),
            runs_R2=np.array(flat, np.int32).reshape(-1, 2),
            num_runs_E=np.array([len(of_example) for of_example in runs], np.int32),
            is_text=content.format == "text" and self._invocation is None,
            num_documents=len(records),
        )
        return TokenShard(np.concatenate([np.asarray(example.ids, self._dtype) for example in found]), index)

    def _invoked(self, example: _Example, records: _Records) -> _Example:
        """The example with the targets that the adapter has a part in: those after the first token of its invocation.
        Raises BadRow where it has none.
        """
        wanted, ids = self._invocation, np.asarray(example.ids)
        assert wanted is not None
        starts = np.empty(0, np.int64)
        if len(wanted) <= len(ids):
            starts = np.flatnonzero((sliding_window_view(ids, len(wanted)) == wanted).all(1))
        if not len(starts):
            text = self._tokenizer.decode(wanted.tolist())
            raise BadRow(
                records[example.document][0],
                f"the tokens {wanted.tolist()} of the invocation {text!r} are not in it, so the adapter would be off: "
                "put the text into each prompt, or, where it has other tokens there, set adapter.invocation_tokens",
            )
        runs = [(0, len(ids))] if example.runs is None else example.runs
        first = int(starts[-1]) + 1
        return example._replace(runs=[(max(start, first), stop) for start, stop in runs if stop > first])

    def _examples(self, format: DataFormat, records: _Records) -> Iterator[_Example]:
        for start in range(0, len(records), _TEXTS_AT_ONCE):
            batch = records[start : start + _TEXTS_AT_ONCE]
            match format:
                case "text":
                    yield from self._texts(batch, start)
                case "prompt_completion":
                    yield from self._prompts(batch, start)
                case "chat":
                    yield from self._chats(batch, start)
                case "preference":
                    yield from self._pairs(batch, start)

    def _texts(self, records: _Records, first: int) -> Iterator[_Example]:
        texts = [record["text"] for _, record in records]
        encoded = token_ids(self._tokenizer, texts) if self._joined else prompt_ids(self._tokenizer, texts)
        for document, ids in enumerate(encoded, start=first):
            # An array: a part has millions of tokens, and a list takes many times the space.
            yield _Example(np.array([*ids, self._tokenizer.eos_token_id], self._dtype), document)  # type: ignore[arg-type]

    def _prompts(self, records: _Records, first: int, completion: str = "completion") -> Iterator[_Example]:
        """The completion as it follows the prompt, where the prompt's tokens are those of the prompt alone."""
        prompts = prompt_ids(self._tokenizer, [record["prompt"] for _, record in records])
        wholes = prompt_ids(self._tokenizer, [record["prompt"] + record[completion] for _, record in records])
        apart = token_ids(self._tokenizer, [record[completion] for _, record in records])
        for document, (prompt, whole, rest) in enumerate(zip(prompts, wholes, apart, strict=True), start=first):
            ids = whole if whole[: len(prompt)] == prompt else [*prompt, *rest]
            ids = [*ids, self._tokenizer.eos_token_id]
            yield _Example(ids, document, [(len(prompt), len(ids))])

    def _chats(self, records: _Records, first: int) -> Iterator[_Example]:
        found = list[tuple[int, Conversation]]()
        for document, (index, record) in enumerate(records, start=first):
            try:
                apart = self._invocation is not None
                found += [(document, c) for c in conversations(record, self._tokenizer, apart=apart)]
            except ValueError as e:
                raise BadRow(index, str(e)) from e
        yield from self._encoded(found)

    def _pairs(self, records: _Records, first: int) -> Iterator[_Example]:
        """Both answers of each row, without targets where they are equal."""
        sides = [self._answers(records, first, name) for name in _ANSWERS]
        for chosen, rejected in zip(*sides, strict=True):
            is_equal = list(chosen.ids) == list(rejected.ids)
            yield from (example._replace(runs=()) if is_equal else example for example in (chosen, rejected))

    def _answers(self, records: _Records, first: int, name: str) -> Iterator[_Example]:
        """One example a row, in order: rows of texts and rows of messages may follow each other."""
        numbered = list(enumerate(records, start=first))
        chats, texts = (
            [r for r in numbered if isinstance(r[1][1]["prompt"], list) == is_list] for is_list in (True, False)
        )
        found = list[tuple[int, Conversation]]()
        for document, (index, record) in chats:
            try:
                found.append((document, answered(record, name, self._tokenizer)))
            except ValueError as e:
                raise BadRow(index, str(e)) from e
        examples = {example.document: example for example in self._encoded(found)}
        for (document, _), example in zip(texts, self._prompts([r for _, r in texts], 0, name), strict=True):
            examples[document] = example._replace(document=document)
        return (examples[document] for document, _ in numbered)

    def _encoded(self, found: Sequence[tuple[int, Conversation]]) -> Iterator[_Example]:
        texts = [conversation.text for _, conversation in found]
        encodings = _backend(self._tokenizer).encode_batch(texts, add_special_tokens=False)
        for (document, conversation), encoding in zip(found, encodings, strict=True):
            yield _Example(encoding.ids, document, _runs(encoding.offsets, conversation.answers))


def _runs(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """[start, stop) of the tokens that have a character of an answer."""
    starts, stops = np.array(offsets, np.int64).reshape(-1, 2).T
    runs = [
        (int(np.searchsorted(stops, begin, side="right")), int(np.searchsorted(starts, end, side="left")))
        for begin, end in answers
    ]
    assert all(a[1] <= b[0] for a, b in pairwise(runs))  # the next question is between
    return [run for run in runs if run[0] < run[1]]


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def check_tokenizer(tokenizer: Any) -> None:
    """Raise DataError where the tokenizer has no end-of-sequence token, or is not one that a server could have."""
    if tokenizer.eos_token_id is None:
        raise DataError("the base model's tokenizer has no end-of-sequence token; set one in its tokenizer_config.json")
    if not tokenizer.is_fast:
        raise DataError("the base model's tokenizer is in Python alone; save it as tokenizer.json, which serving reads")


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise the texts alone."""
    return _encoded(tokenizer, texts, special=False)


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Tokenise texts with the beginning-of-sequence token, without an end-of-sequence token that the tokenizer adds."""
    out = []
    for text, ids in zip(texts, _encoded(tokenizer, texts, special=True), strict=True):
        appended = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
        out.append(ids[:-1] if appended else ids)
    return out


def _encoded(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    encodings = _backend(tokenizer).encode_batch_fast(list(texts), add_special_tokens=special)
    return [encoding.ids for encoding in encodings]


def _backend(tokenizer: Any) -> Any:
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _digest_of(tokenizer: Any) -> str:
    """Names all that decides on tokens: the vocabulary and its rules, special tokens, the template, the library."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {n: v for n, v in backend.items() if n not in ("truncation", "padding")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    named = [rules, special, tokenizer.chat_template, tokenizers.__version__]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
