"""Tokenises rows: token ids with targets, the tokens that the model learns to predict.

chats  targets are the assistant's turns that are learned, rendered with the checkpoint's own chat template
raw    targets are the completion and the end-of-sequence token, behind the prompt as it stands
texts  all tokens are targets; an end-of-sequence token is added
Of pairs both answers are an example each.

A shard has every example whole: rows are cut out of it later. A server tokenises a prompt whole, so a chat is tokenised
whole too, and the answers are found by their characters. Cut into segments, SentencePiece would begin each with a space
that no prompt has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jinja2 import TemplateError
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from loray.errors import DataError
from loray.spec import DataFormat
from loray.train.data.formats import FORMATS, Chat, Message, chats, text_of
from loray.train.data.read import BadRow, Content, FilePart, records_of
from loray.train.data.shards import ShardIndex, TokenShard

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


def conversations(chat: Chat, tokenizer: Any, *, apart: bool = False) -> list[Conversation]:
    """Render what the model learns from one chat. Raises ValueError, which says what is wrong with it.

    To find the answers, the chat is rendered up to each of them; the result must be a prefix of the whole. A
    template that changes earlier turns (Qwen3 drops their reasoning) has no such prefixes: then every answer becomes a
    conversation of its own, with the text that a server has at that point. So it does where they are to be `apart`.
    """
    messages, template = chat.messages, _Template(tokenizer, chat.tools)
    template.check(messages)
    found = [template.turn(messages[: i + 1]) for i in chat.learned]
    spans = [(turn.start, _end(turn, tokenizer.eos_token)) for turn in found]
    if not found:
        return [Conversation(template.render(messages), ())]
    if len(found) > 1 and not apart:  # a single one is rendered whole
        whole = template.render(messages[: chat.learned[-1] + 1])
        if all(whole.startswith(turn.text) for turn in found):
            return [Conversation(whole[: spans[-1][1]], tuple(spans))]
    return [Conversation(turn.text[: span[1]], (span,)) for turn, span in zip(found, spans, strict=True)]


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


# -- examples ---------------------------------------------------------------------------------------------------------

_FORM = 2  # of shards: another one where the same content gives other tokens, or is written in another way
_TEXTS_AT_ONCE = 256  # documents per call of the tokenizer
Records = Sequence[tuple[int, dict[str, Any]]]


class _Example(NamedTuple):
    """`runs` of None: every token is a target. `document` is the number of its row in the part."""

    ids: Sequence[int]
    document: int
    runs: Sequence[tuple[int, int]] | None = None


class Tokenisation:
    """Makes shards of parts. Raises DataError for a tokenizer that cannot do it.

    joined      texts are whole, without what the tokenizer puts before a text
    raw         rows that are no texts go through no template, although there is one
    system      the system prompt of chats without one
    invocation  tokens from whose last occurrence in an example on it is learned, which every example must have; each
                answer of a chat is then an example of its own, since a server invokes the adapter for each
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        joined: bool,
        raw: bool = False,
        system: str | None = None,
        invocation: Sequence[int] | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        self._tokenizer, self._joined, self._system = tokenizer, joined, system
        self._invocation = None if invocation is None else np.asarray(invocation)
        self._is_raw = raw or not tokenizer.chat_template
        self._why_raw = "data.format is raw" if raw else "the base has no chat template"
        self._dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
        self._digest = _digest_of(tokenizer)
        self.beginning: list[int] = prompt_ids(tokenizer, [""])[0] if joined else []

    def check_format(self, name: object, format: DataFormat) -> None:
        """Raise DataError for rows that need a template where there is none."""
        if not self._is_raw or FORMATS[format].turns is None:
            return
        if FORMATS[format].texts is None:
            raise DataError(f"{name} holds chats, but {self._why_raw}; use prompt/completion")
        if self._system is not None:
            raise DataError(f"{name} has no place for data.system, because {self._why_raw}: write it into the prompts")

    def rendering(self, formats: Sequence[DataFormat]) -> str:
        """Say how rows of these formats become tokens, and why."""
        named = list(dict.fromkeys(format for format in formats if format != "text"))
        if not named:
            return "texts as they stand"
        rows = f"{' and '.join(named)} rows"
        return f"{rows} as they stand ({self._why_raw})" if self._is_raw else f"{rows} through the base's chat template"

    def key(self, part: FilePart) -> str:
        """Name the part's shard by all that its tokens depend on."""
        format, is_text = part.file.format, FORMATS[part.file.format].turns is None
        how = self._joined if is_text else [self._is_raw, self._system]
        named = [_FORM, part.digest, format, part.file.columns, how, self._digest]
        if self._invocation is not None:
            named.append(self._invocation.tolist())
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()

    def shard(self, content: Content) -> TokenShard:
        """Tokenise a part. Raises BadRow."""
        return self.tokenised(content.format, records_of(content))

    def tokenised(self, format: DataFormat, records: Records) -> TokenShard:
        """Tokenise rows, as `records_of` gives them. Raises BadRow."""
        found = list(self._examples(format, records))
        if self._invocation is not None:
            found = [self._invoked(example, records) for example in found]
        runs = [example.runs or () for example in found]
        flat = [run for of_example in runs for run in of_example]
        index = ShardIndex(
            lengths_E=np.array([len(example.ids) for example in found], np.int32),
            documents_E=np.array([example.document for example in found], np.int32),
            runs_R2=np.array(flat, np.int32).reshape(-1, 2),
            num_runs_E=np.array([len(of_example) for of_example in runs], np.int32),
            is_text=FORMATS[format].turns is None and self._invocation is None,
            num_documents=len(records),
            desirable_E=self._desirable(format, records)[[example.document for example in found]],
        )
        return TokenShard(np.concatenate([np.asarray(example.ids, self._dtype) for example in found]), index)

    def _invoked(self, example: _Example, records: Records) -> _Example:
        """The example with the targets that the adapter has a part in: those after the first token of its invocation.
        Raises BadRow where something is to be learned without one.
        """
        wanted, ids = self._invocation, np.asarray(example.ids)
        assert wanted is not None
        runs = [(0, len(ids))] if example.runs is None else example.runs
        starts = np.empty(0, np.int64)
        if len(wanted) <= len(ids):
            starts = np.flatnonzero((sliding_window_view(ids, len(wanted)) == wanted).all(1))
        if runs and not len(starts):
            text = self._tokenizer.decode(wanted.tolist())
            raise BadRow(
                records[example.document][0],
                f"the tokens {wanted.tolist()} of the invocation {text!r} are not in it, so the adapter would be off: "
                "put the text into each prompt, or, where it has other tokens there, set adapter.invocation_tokens",
            )
        first = int(starts[-1]) + 1 if runs else 0
        return example._replace(runs=[(max(start, first), stop) for start, stop in runs if stop > first])

    @staticmethod
    def _desirable(format: DataFormat, records: Records) -> NDArray[np.bool_]:
        is_desirable = FORMATS[format].is_desirable
        if is_desirable is None:
            return np.ones(len(records), np.bool_)
        return np.array([_of_row(index, is_desirable, record) for index, record in records], np.bool_)

    def _examples(self, format: DataFormat, records: Records) -> Iterator[_Example]:
        """In the order of rows; of a pair the chosen answer before the rejected one, without targets where they are
        equal.
        """
        is_text = FORMATS[format].turns is None
        make = self._texts if is_text else self._raw if self._is_raw else self._chats
        for start in range(0, len(records), _TEXTS_AT_ONCE):
            examples = make(format, records[start : start + _TEXTS_AT_ONCE], start)
            if not FORMATS[format].is_pair:
                yield from examples
                continue
            for chosen, rejected in zip(examples, examples, strict=True):
                is_equal = list(chosen.ids) == list(rejected.ids)
                yield from (example._replace(runs=()) if is_equal else example for example in (chosen, rejected))

    def _texts(self, format: DataFormat, records: Records, first: int) -> Iterator[_Example]:
        texts = [_of_row(index, text_of, record["text"], "text") for index, record in records]
        encoded = token_ids(self._tokenizer, texts) if self._joined else prompt_ids(self._tokenizer, texts)
        for document, ids in enumerate(encoded, start=first):
            # An array: a part has millions of tokens, and a list takes many times the space.
            yield _Example(np.array([*ids, self._tokenizer.eos_token_id], self._dtype), document)  # type: ignore[arg-type]

    def _raw(self, format: DataFormat, records: Records, first: int) -> Iterator[_Example]:
        """The completion as it follows the prompt, where the prompt's tokens are those of the prompt alone."""
        texts = FORMATS[format].texts
        assert texts is not None, format
        found = [
            (document, *pair)
            for document, (index, record) in enumerate(records, start=first)
            for pair in _of_row(index, texts, record)
        ]
        prompts = prompt_ids(self._tokenizer, [prompt for _, prompt, _ in found])
        wholes = prompt_ids(self._tokenizer, [prompt + completion for _, prompt, completion in found])
        apart = token_ids(self._tokenizer, [completion for *_, completion in found])
        for (document, *_), prompt, whole, rest in zip(found, prompts, wholes, apart, strict=True):
            ids = whole if whole[: len(prompt)] == prompt else [*prompt, *rest]
            ids = [*ids, self._tokenizer.eos_token_id]
            yield _Example(ids, document, [(len(prompt), len(ids))])

    def _chats(self, format: DataFormat, records: Records, first: int) -> Iterator[_Example]:
        rendered = partial(conversations, apart=self._invocation is not None)
        found = [
            (document, conversation)
            for document, (index, record) in enumerate(records, start=first)
            for chat in _of_row(index, chats, format, record, self._system)
            for conversation in _of_row(index, rendered, chat, self._tokenizer)
        ]
        yield from self._encoded(found)

    def _encoded(self, found: Sequence[tuple[int, Conversation]]) -> Iterator[_Example]:
        texts = [conversation.text for _, conversation in found]
        encodings = _backend(self._tokenizer).encode_batch(texts, add_special_tokens=False)
        for (document, conversation), encoding in zip(found, encodings, strict=True):
            yield _Example(encoding.ids, document, _runs(encoding.offsets, conversation.answers))


def _of_row(index: int, make: Callable[..., Any], *given: Any) -> Any:
    """What is wrong with the row is at `index`."""
    try:
        return make(*given)
    except ValueError as e:
        raise BadRow(index, str(e)) from e


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


def rules_of(tokenizer: Any) -> dict[str, Any]:
    """Lists the vocabulary and the rules that make tokens of a text."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {n: v for n, v in backend.items() if n not in ("truncation", "padding")}


def _digest_of(tokenizer: Any) -> str:
    """Names all that decides on tokens: the vocabulary and its rules, special tokens, the template, the library."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    named = [rules_of(tokenizer), special, tokenizer.chat_template, tokenizers.__version__]
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
