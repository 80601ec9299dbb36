"""Which parser a model needs, and which tokens its parser must see."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from loray.spec import ToolParserName, ToolUse
from loray.text.tools.families import HermesParser, LlamaParser, MistralParser
from loray.text.tools.parser import CharacterParser, ToolParser

_PARSERS: Mapping[ToolParserName, type[CharacterParser]] = {
    "hermes": HermesParser,
    "llama3_json": LlamaParser,
    "mistral": MistralParser,
}
# What a parser looks for. Where it is a token of the tokenizer, that token must become text.
MARKERS: Mapping[ToolParserName, Sequence[str]] = {
    "hermes": (HermesParser.BEGIN, HermesParser.END),
    "llama3_json": (LlamaParser.BEGIN,),
    "mistral": (MistralParser.BEGIN, MistralParser.ARGUMENTS, MistralParser.CALL_ID),
}


def parser_for(name: ToolParserName, use: ToolUse) -> ToolParser:
    """A parser for one answer."""
    return _PARSERS[name]([tool.name for tool in use.callable])


def detect(added_tokens: Collection[str], template: str = "") -> ToolParserName:
    """The form in which a base writes calls, by its tokenizer's added tokens and the text of its chat template. A base
    that shows no sign of one gets loray's own prompt, which asks for that of Hermes.
    """
    for known in (added_tokens, template):
        if MistralParser.BEGIN in known:
            return "mistral"
        if HermesParser.BEGIN in known:
            return "hermes"
        if LlamaParser.BEGIN in known and "tools" in template:
            return "llama3_json"
    return "hermes"
