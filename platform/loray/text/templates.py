"""Chat templates: Jinja with the extras that transformers gives it, without transformers.

https://huggingface.co/docs/transformers/chat_templating_writing lists them: `tojson`, `raise_exception`,
`strftime_now`, `namespace`, loop controls and the `generation` block. Templates come with models, so they run in
Jinja's sandbox; those of adapters also run in a process of their own: see `loray.text.isolated`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loray.errors import RequestError

_END_OF_MESSAGE = "\ue000end of the last message\ue001"  # of the private use area, which texts do not use by chance
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """One template. Raises RequestError where it is not valid Jinja.

    It is compiled when it is first rendered: Jinja computes constant expressions then, which may take any time.

    knows_tools  the template reads `tools`
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source, self.special_tokens = source, dict(special_tokens or {})
        try:
            names = _environment().parse(source).find_all(nodes.Name)
            self.knows_tools = any(name.name == "tools" for name in names)
        except (TemplateError, RecursionError) as e:
            raise RequestError(f"the model's chat template is not valid: {e}") from e

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `continue_final_message`: it ends in the last message's text, without what closes a turn.

        Raises RequestError where the template refuses these messages.
        """
        chat = [dict(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] = chat[-1].get("content", "") + _END_OF_MESSAGE + " "
        given = self.special_tokens | dict(variables or {}) | {"messages": chat, "tools": tools, "documents": None}
        try:
            text = self._template.render(given | {"add_generation_prompt": add_generation_prompt})
        except Exception as e:  # a template may fail in any way
            raise RequestError(f"the model's chat template refuses these messages: {e}", "messages") from e
        return _cut(text) if continue_final_message else text


class ChatTemplates:
    """A model's templates: the default one, and by other names, of which `tool_use` is for requests with tools."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self._sources, self.special_tokens = dict(sources), dict(special_tokens or {})

    @classmethod
    def load(cls, folder: Path) -> ChatTemplates:
        """Those in a checkpoint's folder, in any of the places where transformers looks for them."""
        config = _read_json(folder / "tokenizer_config.json")
        sources: dict[str, str] = {}
        match config.get("chat_template"):
            case str(source):
                sources["default"] = source
            case list(named):
                sources |= {t["name"]: t["template"] for t in named}
        if isinstance(older := _read_json(folder / "chat_template.json").get("chat_template"), str):
            sources["default"] = older
        files = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]
        for file in files:
            if file.is_file():
                name = "default" if file.name == "chat_template.jinja" else file.stem
                sources[name] = file.read_text(encoding="utf-8")
        return cls(sources, special_tokens(config))

    def find(self, *, with_tools: bool) -> ChatTemplate | None:
        """The template for a request; None if the model has none."""
        return (self._tool_use if with_tools else None) or self._default

    @cached_property
    def _default(self) -> ChatTemplate | None:
        return self._compiled("default")

    @cached_property
    def _tool_use(self) -> ChatTemplate | None:
        return self._compiled("tool_use")

    def _compiled(self, name: str) -> ChatTemplate | None:
        source = self._sources.get(name)
        return None if source is None else ChatTemplate(source, self.special_tokens)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names; a value is the token, or an object with its content."""
    found = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None}
    return {name: str(value["content"] if isinstance(value, dict) else value) for name, value in found.items()}


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _cut(text: str) -> str:
    """Text up to the end of the last message, without whitespace there if the template cuts that off."""
    before, found, after = text.rpartition(_END_OF_MESSAGE)
    if not found:
        raise RequestError(
            "continue_final_message: the model's chat template does not write the last message as it is", "messages"
        )
    return before if after.startswith(" ") else before.rstrip()


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks for training what an assistant wrote; here its content counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Refuses private attributes, which could reach into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        Namespace.__init__(self, *given, **values)
        for name in dict(*given, **values):
            _check_attribute(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a chat template may not set {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike Jinja's own filter, without escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": _Namespace,
    }
    return environment
