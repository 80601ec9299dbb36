"""`loray chat`: one conversation with each of several models."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loray.cli.connect import complete_models, target, url_option
from loray.client import LorayClient
from loray.errors import EngineError, LorayError
from loray.spec import format_seconds, printable

_HELP = "/reset forgets the conversation, /system TEXT sets the system prompt, /quit ends (as Ctrl-D does)"
_REFRESH_S = 0.1


@dataclass(slots=True)
class ChatAnswer:
    """An answer to a message. `ttft_s`: from the request to the first text. `num_tokens`: as the server counts them."""

    model: str
    text: str = ""
    error: str | None = None
    ttft_s: float | None = None
    total_s: float = 0.0
    num_tokens: int = 0

    @property
    def figures(self) -> str:
        """Tokens, tokens a second after the first, and the time to the first."""
        if self.ttft_s is None:
            return f"{self.num_tokens} tokens"
        after = self.total_s - self.ttft_s
        rate = f", {(self.num_tokens - 1) / after:,.1f} tokens/s" if self.num_tokens > 1 and after > 0 else ""
        return f"{self.num_tokens} tokens{rate}, first after {format_seconds(self.ttft_s)}"


@click.command()
@click.argument("model", shell_complete=complete_models)
@click.option(
    "--compare", multiple=True, metavar="MODEL", shell_complete=complete_models, help="Also ask this; repeatable."
)
@click.option("--system", help="The system prompt.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Of an answer.")
@click.option("--temperature", type=click.FloatRange(0), help="Default: the server's.")
@click.option("--quiet", "-q", is_flag=True, help="No figures after answers.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for each answer.")
@url_option
def chat(
    model: str,
    compare: tuple[str, ...],
    system: str | None,
    max_tokens: int,
    temperature: float | None,
    quiet: bool,
    as_json: bool,
    url: str | None,
) -> None:
    """Talk to MODEL: a base, or an adapter as `name`, `name@3` or `name@alias`.

    Each line is a message, from the terminal or a pipe. /reset forgets the conversation, /system TEXT sets the system
    prompt, /quit ends. With --compare every model gets each message and has its own conversation; answers are in
    columns, or under headings where the output is no terminal.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens}
    if temperature is not None:
        options["temperature"] = temperature
    with LorayClient(target(url)) as client:
        talk = Talk(client, dict.fromkeys((model, *compare)), system, options)
        for name in talk.messages:
            client.model(name)  # says at once what is not served
        for line in _lines(f"{_HELP}\n"):
            if line == "/quit":
                return
            if line == "/reset":
                talk.reset()
                click.echo("a new conversation", err=True)
            elif line.startswith("/system"):
                talk.reset(line.removeprefix("/system").strip())
                click.echo("a new conversation, with that system prompt", err=True)
            elif line.startswith("/"):
                click.echo(_HELP, err=True)
            elif line:
                _ask(talk, line, quiet=quiet, as_json=as_json)


class Talk:
    """One conversation for each model."""

    def __init__(
        self, client: LorayClient, models: Iterable[str], system: str | None, options: Mapping[str, Any]
    ) -> None:
        self._client, self._system, self._options = client, system, options
        self.messages: dict[str, list[dict[str, str]]] = {name: [] for name in models}
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forgets what was said; `system` replaces the system prompt."""
        self._system = self._system if system is None else system or None
        for name in self.messages:
            self.messages[name] = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, line: str, answer: ChatAnswer, show: Callable[[str], None] = lambda piece: None) -> None:
        """Asks the answer's model, and fills the answer. `show` gets each piece of text as a terminal may have it; on a
        terminal also what the model thinks before, dimmed.

        A failed answer's question is forgotten. Ctrl-C ends an answer, not the conversation.
        """
        began, is_thinking = time.monotonic(), False
        messages = [*self.messages[answer.model], {"role": "user", "content": line}]
        try:
            for chunk in self._client.stream_chat(
                answer.model, messages, stream_options={"include_usage": True}, **self._options
            ):
                for delta in (choice.delta for choice in chunk.choices):
                    thought, piece = delta.reasoning or "", delta.content or ""
                    if answer.ttft_s is None and (thought or piece):
                        answer.ttft_s = time.monotonic() - began
                    if thought and sys.stdout.isatty():
                        show(click.style(printable(thought), dim=True))
                        is_thinking = True
                    if piece:
                        answer.text += piece
                        show(f"\n\n{printable(piece)}" if is_thinking else printable(piece))
                        is_thinking = False
                if chunk.usage is not None:
                    answer.num_tokens = chunk.usage.completion_tokens
            answer.total_s = time.monotonic() - began
        except LorayError as e:
            answer.error = str(e)
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        self.messages[answer.model] = [*messages, {"role": "assistant", "content": answer.text}]


def _ask(talk: Talk, line: str, *, quiet: bool, as_json: bool) -> None:
    """Asks every model. Raises EngineError where all answers failed, and no terminal waits for the next question."""
    answers = [ChatAnswer(name) for name in talk.messages]
    if len(answers) > 1 and sys.stdout.isatty() and not as_json:
        side_by_side(talk, line, answers, quiet=quiet)
    else:
        for answer in answers:
            if as_json:
                talk.answer(line, answer)
                click.echo(json.dumps(asdict(answer), ensure_ascii=False))
                continue
            if len(answers) > 1:
                click.secho(f"── {answer.model} ──", bold=True)
            talk.answer(line, answer, partial(click.echo, nl=False))
            click.echo()
            if answer.error is not None:
                click.echo(f"error: {answer.error}", err=True)
            elif not quiet:
                click.secho(answer.figures, dim=True, err=not sys.stdout.isatty())
    errors = [answer.error for answer in answers if answer.error is not None]
    if len(errors) == len(answers) and not sys.stdin.isatty():
        raise EngineError(errors[0])


def side_by_side(talk: Talk, line: str, answers: Sequence[ChatAnswer], *, quiet: bool) -> None:
    """Asks all models at once, and shows their answers in columns as they come."""

    def columns() -> Table:
        made = Table.grid(expand=True)
        panels = []
        for answer in answers:
            made.add_column(ratio=1)
            text = Text(printable(answer.text)) if answer.error is None else Text(f"error: {answer.error}", style="red")
            subtitle = None if quiet or not answer.total_s else answer.figures
            panels.append(Panel(text, title=answer.model, subtitle=subtitle))
        made.add_row(*panels)
        return made

    with (
        ThreadPoolExecutor(len(answers)) as threads,
        Live(columns(), console=Console(), auto_refresh=False, vertical_overflow="visible") as live,
    ):
        asked = [threads.submit(talk.answer, line, answer) for answer in answers]
        while wait(asked, timeout=_REFRESH_S).not_done:
            live.update(columns(), refresh=True)
        live.update(columns(), refresh=True)
        for task in asked:
            task.result()


def _lines(greeting: str) -> Iterator[str]:
    """Messages from the terminal, with a prompt and its history, or the lines of stdin."""
    if not sys.stdin.isatty():
        yield from (line.strip() for line in sys.stdin)
        return
    import readline  # noqa: F401  input() has a history and arrow keys with it

    click.echo(greeting, err=True, nl=False)
    while True:
        try:
            line = input("› ")
        except EOFError:
            click.echo()
            return
        yield line.strip()
