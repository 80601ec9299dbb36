"""What an answer must match: JSON by a schema, a regular expression, one of some texts, or a grammar.

The grammars are those of llguidance, which computes the masks: https://github.com/guidance-ai/llguidance/tree/main/docs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from loray.spec.fields import Frozen

Schema = Mapping[str, Any] | bool
MAX_CHARACTERS = 64 << 10  # of a schema, pattern, list of texts or grammar
ANY_OBJECT: Schema = {"type": "object"}


class Tag(NamedTuple):
    """A part of a text that must be JSON by `schema`, between `begin` and `end`."""

    begin: str
    schema: Schema
    end: str


class Constraint(Frozen):
    """Equal constraints have equal fields, so that what was compiled once can be looked up.

    kind        what `text` is
    text        json_schema: the schema as JSON; regex: for the whole answer, in the syntax of Rust's regex, but that
                \\d, \\w and \\s are ASCII's; choice: a JSON list of texts; grammar: Lark as in llguidance's
                docs/syntax.md, or GBNF
    whitespace  json_schema: a regular expression for the space between two tokens of JSON; "": none; None: any
    lenient     json_schema: keywords that cannot be enforced are ignored, not refused
    """

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    text: str
    whitespace: str | None = None
    lenient: bool = False

    @classmethod
    def from_schema(cls, schema: Schema, *, whitespace: str | None = None, lenient: bool = False) -> Self:
        """JSON that validates against `schema` (draft 2020-12), with an object's properties in the schema's order."""
        return cls(kind="json_schema", text=json.dumps(schema), whitespace=whitespace, lenient=lenient)

    @classmethod
    def from_regex(cls, pattern: str) -> Self:
        return cls(kind="regex", text=pattern)

    @classmethod
    def from_choice(cls, texts: Sequence[str]) -> Self:
        """Exactly one of `texts`."""
        return cls(kind="choice", text=json.dumps(list(texts)))

    @classmethod
    def from_grammar(cls, grammar: str) -> Self:
        """Lark or GBNF. Lark may contain `%json {schema}`, and special tokens as `<|im_end|>`."""
        return cls(kind="grammar", text=grammar)

    @classmethod
    def from_tags(cls, tags: Sequence[Tag], triggers: Sequence[str]) -> Self:
        """Any text, but where a trigger occurs in it, one of the tags that begin with that trigger follows.

        ValueError for a tag that begins with no trigger.
        """
        rules = []
        for i, tag in enumerate(tags):
            trigger = next((t for t in triggers if t and tag.begin.startswith(t)), None)
            if trigger is None:
                raise ValueError(f"no trigger is the beginning of {tag.begin!r}")
            parts = (json.dumps(tag.begin[len(trigger) :]), f"%json {json.dumps(tag.schema)}", json.dumps(tag.end))
            rules.append(f"head_{i}[lazy]: TEXT {json.dumps(trigger)}")
            rules.append(f"tag_{i}: head_{i} {' '.join(part for part in parts if part != json.dumps(''))}")
        options = " | ".join(f"tag_{i}" for i in range(len(tags)))
        return cls.from_grammar("\n".join((f"start: ({options})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/", *rules)))
