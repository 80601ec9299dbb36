"""What an answer must match: JSON by a schema, a regular expression, one of some texts, or a grammar.

The grammars are those of llguidance, which computes the masks: https://github.com/guidance-ai/llguidance/tree/main/docs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

from loray.spec.fields import Frozen

Schema = Mapping[str, Any] | bool
ANY_OBJECT: Schema = {"type": "object"}


class Tag(NamedTuple):
    """A part of a text that must be JSON by `schema`, between `begin` and `end`."""

    begin: str
    schema: Schema
    end: str


class Constraint(Frozen):
    """Equal constraints have equal fields, so that what was compiled once can be looked up.

    kind        what `text` is
    text        json_schema: the schema as JSON; regex: in Rust's syntax, for the whole answer; choice: a JSON list of
                texts; grammar: Lark as in llguidance's docs/syntax.md, or GBNF, which `loray.text.grammar` makes Lark
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

    def to_llguidance(self) -> str:
        """The grammar in llguidance's JSON form; ValueError where `text` is not the JSON that it must be."""
        if self.kind == "json_schema":
            return json.dumps({"grammars": [{"json_schema": self._schema()}]})
        lark = self.text
        if self.kind == "regex":
            lark = f"start: {_terminal(self.text)}"
        elif self.kind == "choice":
            lark = f"start: {' | '.join(json.dumps(text) for text in json.loads(self.text))}"
        return json.dumps({"grammars": [{"lark_grammar": lark}]})

    def _schema(self) -> Mapping[str, Any]:
        schema = json.loads(self.text)
        if not isinstance(schema, dict):
            schema = {"allOf": [schema]}  # true or false; anything else is refused as a schema
        space: dict[str, Any] = {}
        if self.whitespace is not None:
            space = {"whitespace_pattern": self.whitespace} if self.whitespace else {"whitespace_flexible": False}
        return schema | {"x-guidance": space | ({"lenient": True} if self.lenient else {})}


def _terminal(pattern: str) -> str:
    """A regular expression between slashes, as Lark has them."""
    out, escaped = [], False
    for char in pattern:
        if char == "\n":
            out.append("n" if escaped else "\\n")
        else:
            out.append("\\/" if char == "/" and not escaped else char)
        escaped = char == "\\" and not escaped
    return f"/{''.join(out)}/"
