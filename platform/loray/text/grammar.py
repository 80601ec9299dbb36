"""Constraints on answers, compiled by llguidance for engines, and checked by gateways.

A grammar is refused where it exceeds a limit; the limits are chosen so that a refusal takes less than a tenth of a
second.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loray.bases import tokenizer
from loray.bases.registry import BaseModel
from loray.errors import IntegrityError, RequestError
from loray.spec import Constraint
from loray.spec.generation import MAX_CHARACTERS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


MAX_NESTING = 256  # of brackets in a pattern or grammar
MASK_BUDGET_S, MASK_BUDGET_GPU_S = 0.005, 0.002  # for masks in a step
MAX_MEAN_MASK_S = 0.005  # for a token's mask; a request with more ends
MIN_MASKS = 32  # of a request, before that
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "max_grammar_size": 20_000,
    "step_lexer_fuel": 200_000,  # of one token's mask: about 15 ms
    "step_max_items": 50_000,  # 3 ms
    "max_lexer_states": 50_000,  # 50 to 100 MB
}
# A grammar is Lark if it has a rule `start`, perhaps with a modifier, a priority or attributes; GBNF has `root ::=`.
_LARK = re.compile(r"^\s*(%llguidance\b|[?!]?start(\.\d+)?\s*(\[[^\]\n]*\])?\s*:(?!:=))", re.MULTILINE)
_BRACKETS = re.compile(r"[][(){}]")
_IGNORED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")
_building = threading.Lock()


def ignored_keywords(matcher: LLMatcher) -> tuple[str, ...]:
    """The keywords of a lenient constraint's schema that answers may violate."""
    found: dict[str, None] = {}
    for warning in matcher.get_grammar_warnings():
        for names in _IGNORED.findall(warning):
            found |= dict.fromkeys(json.loads(names))
    return tuple(found)


class GrammarCompiler:
    """A compiler of a base's constraints. Several threads may use it, which llguidance lets run side by side."""

    def __init__(self, base: BaseModel) -> None:
        self._args = base.path, base.config.vocab_size, tuple(base.config.eos_token_ids)

    def compile(self, constraint: Constraint) -> LLMatcher:
        """A matcher at the beginning of an answer. Raises RequestError where the constraint is wrong or too large."""
        _check_size(constraint)
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = json.dumps({"grammars": [_grammar(constraint)]})
        except (ValueError, RecursionError) as e:
            raise RequestError(f"the {_NAMES[constraint.kind]} cannot be read: {e}") from e
        limits = LLParserLimits(**_LIMITS, verbose_errors=False)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            why, *_ = matcher.get_error().strip().splitlines() or ["no reason is known"]
            raise RequestError(f"the {_NAMES[constraint.kind]} cannot be enforced: {why}")
        matcher.compute_bitmask()  # the first takes milliseconds; copies of the matcher have what it found
        if matcher.is_error():
            raise RequestError(f"no answer can match the {_NAMES[constraint.kind]}; correct it")
        return matcher

    def warm(self) -> None:
        """Build the tokenizer now: that holds the interpreter for a quarter of a second, once in a process."""
        with suppress(RequestError):
            _ = self.tokenizer

    @property
    def tokenizer(self) -> LLTokenizer:
        """The base's tokenizer. Raises RequestError if it is none that llguidance can read."""
        with _building:
            return _tokenizer(*self._args)


@lru_cache(maxsize=8)
def _tokenizer(folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """The tokenizer of a base as llguidance has it, about 30 MB. The model may have more tokens than the tokenizer."""
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(tokenizer.read(folder), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except (OSError, ValueError, IntegrityError) as e:
        raise RequestError(f"answers of {folder.name} cannot be held to a constraint by its tokenizer: {e}") from e


_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}


def _check_size(constraint: Constraint) -> None:
    text = constraint.text
    if len(text) > MAX_CHARACTERS:
        raise RequestError(
            f"a constraint on the answer may have {MAX_CHARACTERS} characters, this one has {len(text)}; shorten it"
        )
    if constraint.kind == "choice":
        return
    depth = deepest = 0
    for found in _BRACKETS.finditer(text):
        depth += 1 if found[0] in "([{" else -1
        deepest = max(deepest, depth)
    if deepest > MAX_NESTING:
        raise RequestError(f"a constraint on the answer may nest {MAX_NESTING} brackets, this one nests {deepest}")


def _grammar(constraint: Constraint) -> dict[str, Any]:
    """The constraint as llguidance takes it. Raises ValueError where the text is not what it must be."""
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if constraint.kind == "json_schema":
        return {"json_schema": _schema(constraint)}
    if constraint.kind == "regex":  # ASCII's classes, so that Python's and JavaScript's expressions agree
        return {"lark_grammar": f"start: /{regex_to_lark(constraint.text, 'dws')}/"}
    if constraint.kind == "choice":
        return {"lark_grammar": f"start: {' | '.join(json.dumps(text) for text in json.loads(constraint.text))}"}
    if _LARK.search(constraint.text):
        return {"lark_grammar": constraint.text}
    try:
        return {"lark_grammar": gbnf_to_lark(constraint.text)}
    except Exception as e:
        raise ValueError(f"it is not Lark, as no rule is called start, and as GBNF it is wrong: {e}") from e


def _schema(constraint: Constraint) -> dict[str, Any]:
    schema = json.loads(constraint.text)
    if not isinstance(schema, dict):
        schema = {"allOf": [schema]}  # true or false; anything else is refused as a schema
    options: dict[str, Any] = {"lenient": True} if constraint.lenient else {}
    if constraint.whitespace:
        options["whitespace_pattern"] = constraint.whitespace
    elif constraint.whitespace is not None:
        options["whitespace_flexible"] = False
    return schema | {"x-guidance": options}


# -- in gateways ------------------------------------------------------------------------------------------------------

_MAX_KNOWN = 512  # constraints that were checked, the last used of which are remembered
_NUM_THREADS = 2


class _Found(NamedTuple):
    """The reason why a constraint is refused, or the keywords of it that are ignored."""

    refusal: str | None
    ignored: tuple[str, ...] = ()


class GrammarChecker:
    """A checker of constraints, which compiles them as engines do. It is for one event loop."""

    def __init__(self, base: BaseModel) -> None:
        self._compiler = GrammarCompiler(base)
        self._compiler.warm()
        self._found: OrderedDict[Constraint, Future[_Found]] = OrderedDict()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="grammar")

    async def check(self, constraint: Constraint, param: str | None = None) -> tuple[str, ...]:
        """The keywords of a lenient schema that are ignored. Raises RequestError, which names the field `param`, where
        an engine cannot enforce the constraint, or it exceeds a limit.
        """
        future = self._found.get(constraint)
        if future is None:
            future = self._found[constraint] = self._threads.submit(self._compiled, constraint)
            if len(self._found) > _MAX_KNOWN:
                self._found.popitem(last=False)
        self._found.move_to_end(constraint)
        found = future.result() if future.done() else await asyncio.shield(asyncio.wrap_future(future))
        if found.refusal is not None:
            raise RequestError(found.refusal, param)
        return found.ignored

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, constraint: Constraint) -> _Found:
        try:
            return _Found(None, ignored_keywords(self._compiler.compile(constraint)))
        except RequestError as e:
            return _Found(str(e))
