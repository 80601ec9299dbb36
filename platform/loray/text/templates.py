"""Chat templates, which are Jinja's with what transformers adds: `tojson`, `raise_exception`, `strftime_now`,
`namespace`, loop controls and the `generation` block
(https://huggingface.co/docs/transformers/chat_templating_writing).

Templates come with models, so they run in Jinja's sandbox. It keeps a template from reaching into Python, but not from
looping for ever or doubling a text until the memory is full. A base's template was chosen by who runs the server; an
adapter's comes from whoever published it, and runs in a process of its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loray.errors import Overloaded, RequestError

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
        if not continue_final_message:
            return text
        before, found, after = text.rpartition(_END_OF_MESSAGE)
        if not found:
            raise RequestError(
                "continue_final_message: the model's chat template does not write the last message as it is", "messages"
            )
        return before if after.startswith(" ") else before.rstrip()  # the template may cut whitespace off there


class ChatTemplates:
    """A model's templates: the default one, and by other names, of which `tool_use` is for requests with tools."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None) -> None:
        self._sources, self.special_tokens = dict(sources), dict(special_tokens or {})
        self._templates: dict[str, ChatTemplate] = {}  # those that a request has had

    @classmethod
    def load(cls, folder: Path) -> ChatTemplates:
        """The templates in a checkpoint's folder, in any of the places where transformers looks for them."""
        config = _read_json(folder / "tokenizer_config.json")
        sources: dict[str, str] = {}
        match config.get("chat_template"):
            case str(source):
                sources["default"] = source
            case list(several):
                sources |= {t["name"]: t["template"] for t in several}
        if isinstance(own := _read_json(folder / "chat_template.json").get("chat_template"), str):
            sources["default"] = own
        files = [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]
        for file in files:
            if file.is_file():
                name = "default" if file.name == "chat_template.jinja" else file.stem
                sources[name] = file.read_text(encoding="utf-8")
        named = {name: config[name] for name in _SPECIAL_TOKENS if config.get(name) is not None}
        tokens = {name: str(token["content"] if isinstance(token, dict) else token) for name, token in named.items()}
        return cls(sources, tokens)

    def find(self, *, with_tools: bool) -> ChatTemplate | None:
        """The template for a request; None if the model has none."""
        name = "tool_use" if with_tools and "tool_use" in self._sources else "default"
        if name not in self._templates and name in self._sources:
            self._templates[name] = ChatTemplate(self._sources[name], self.special_tokens)
        return self._templates.get(name)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks for training what an assistant wrote; here its content counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's namespace without private attributes, which could reach into Python."""

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
    """JSON without escapes for HTML, which Jinja's own filter has."""
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


# -- templates of adapters --------------------------------------------------------------------------------------------

MAX_PROMPT_CHARACTERS = 16 << 20
TIMEOUT_S = 0.5  # of one prompt; most take a few milliseconds
_START_S = 10.0  # for a process to start
SLOW_S = 0.25  # of the processor's time, for one prompt
MAX_SLOW = 3  # slow prompts of a template within SLOW_WINDOW_S; then it is refused
SLOW_WINDOW_S = 60.0
_MEMORY_BYTES = 1 << 30  # of the process's address space
REFUSED_S = 60.0  # for which a template that was stopped or is slow is not tried again
_READY = b"ready\n"


class IsolatedRenderer:
    """A renderer with a process for each thread that calls it at the same time; there is none before the first call."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._idle: list[_Process] = []
        self._refused: dict[str, float] = {}  # a template's source → until when
        self._slow: dict[str, list[float]] = {}  # a template's source → when it was slow
        self._lock = threading.Lock()

    def render(self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt, as `ChatTemplate.render` gives it. Raises RequestError also for a template that takes too much
        time or memory, and Overloaded where no process can be started.
        """
        task = {"source": template.source, "special_tokens": template.special_tokens, "messages": messages}
        line = json.dumps(task | {"options": options}).encode() + b"\n"
        with self._lock:
            if self._refused.get(template.source, 0.0) > time.monotonic():
                raise _too_much()
            process = self._idle.pop() if self._idle else None
        process = _Process() if process is None else process
        try:
            answer = json.loads(process.ask(line, self._timeout_s))
        except (OSError, ValueError):
            process.stop()
            self._refuse(template.source)
            raise _too_much() from None
        except BaseException:
            process.stop()
            raise
        with self._lock:
            self._idle.append(process)
        if answer["seconds"] > SLOW_S:
            self._was_slow(template.source)
        if "error" in answer:
            raise RequestError(answer["error"], answer["param"])
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            processes, self._idle = self._idle, []
        for process in processes:
            process.stop()

    def _refuse(self, source: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._refused = {s: until for s, until in self._refused.items() if until > now}
            self._refused[source] = now + REFUSED_S

    def _was_slow(self, source: str) -> None:
        now = time.monotonic()
        with self._lock:
            self._slow = {s: times for s, times in self._slow.items() if times[-1] > now - SLOW_WINDOW_S}
            times = [at for at in self._slow.get(source, ()) if at > now - SLOW_WINDOW_S]
            self._slow[source] = [*times, now]
        if len(times) + 1 >= MAX_SLOW:
            self._refuse(source)


class _Process:
    """A process that renders one template at a time. Raises Overloaded where it does not start."""

    def __init__(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for the server, which lets its requests end
            )
        except OSError as e:
            raise Overloaded(f"the adapter's chat template cannot be rendered now: {e}", 1.0) from e
        try:
            self.ask(b"", _START_S)  # its first line says that it is ready
        except OSError as e:
            self.stop()
            raise Overloaded("the adapter's chat template cannot be rendered now: no process starts for it", 1.0) from e

    def ask(self, line: bytes, timeout_s: float) -> bytes:
        """The answer to one line. Raises OSError if there is none in time; then the process is killed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        is_late = threading.Event()

        def kill() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(timeout_s, kill)
        timer.start()
        try:
            stdin.write(line)
            stdin.flush()
            answer = stdout.readline()
        finally:
            timer.cancel()
            timer.join()  # from now on it does not kill
        if is_late.is_set() or not answer.endswith(b"\n"):
            raise BrokenPipeError("the process that renders templates has ended")
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def _too_much() -> RequestError:
    return RequestError("the adapter's chat template takes too much time or memory for these messages", "messages")


# -- in the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer each JSON object, which is a line of the input, with one, until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    ChatTemplate("{{ messages }}").render([])  # what the first template would wait for
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    for line in sys.stdin.buffer:
        begun = time.process_time()
        answer = _answer(json.loads(line))
        sys.stdout.write(json.dumps(answer | {"seconds": time.process_time() - begun}) + "\n")
        sys.stdout.flush()


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    try:
        template = _template(task["source"], tuple(task["special_tokens"].items()))
        text = template.render(task["messages"], **task["options"])
    except RequestError as e:
        return {"error": str(e), "param": e.param}
    if len(text) > MAX_PROMPT_CHARACTERS:
        return {"error": str(_too_much()), "param": "messages"}
    return {"text": text}


@lru_cache(maxsize=64)
def _template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens))


if __name__ == "__main__":
    main()
