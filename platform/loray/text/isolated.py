"""Templates of adapters, rendered in a process of their own, which may use little memory and little time.

Jinja's sandbox keeps a template from reaching into Python, but not from looping for ever or doubling a text until the
memory is full. A base's template was chosen by who runs the server; an adapter's comes from whoever published it.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import IO, Any

from loray.errors import Overloaded, RequestError
from loray.text.templates import ChatTemplate

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
    """Renders in one process for each thread that calls it at the same time. There is none before the first call."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._idle: list[_Process] = []
        self._refused: dict[str, float] = {}  # a template's source → until when
        self._slow: dict[str, list[float]] = {}  # a template's source → when it was slow
        self._lock = threading.Lock()

    def render(self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """As `ChatTemplate.render`. Raises RequestError also for a template that takes too much time or memory, and
        Overloaded where no process can be started.
        """
        task = {"source": template.source, "special_tokens": template.special_tokens, "messages": messages}
        line = json.dumps(task | {"options": options}).encode() + b"\n"
        process = self._taken(template.source)
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

    def _taken(self, source: str) -> _Process:
        """A process that is ready, for this template."""
        with self._lock:
            if self._refused.get(source, 0.0) > time.monotonic():
                raise _too_much()
            process = self._idle.pop() if self._idle else None
        return _Process() if process is None else process

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
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._stdin, self._stdout = stdin, stdout
        try:
            _read_line(stdout, time.monotonic() + _START_S)
        except OSError as e:
            self.stop()
            raise Overloaded("the adapter's chat template cannot be rendered now: no process starts for it", 1.0) from e

    def ask(self, line: bytes, timeout_s: float) -> bytes:
        """The answer to one line. Raises OSError (TimeoutError too) if there is none."""
        deadline = time.monotonic() + timeout_s
        _write(self._stdin, line, deadline)
        return _read_line(self._stdout, deadline)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def _write(pipe: IO[bytes], data: bytes, deadline: float) -> None:
    os.set_blocking(pipe.fileno(), False)
    rest = memoryview(data)
    while rest:
        _wait(pipe, deadline, write=True)
        rest = rest[os.write(pipe.fileno(), rest) :]


def _read_line(pipe: IO[bytes], deadline: float) -> bytes:
    chunks: list[bytes] = []
    while not chunks or not chunks[-1].endswith(b"\n"):
        _wait(pipe, deadline, write=False)
        chunk = os.read(pipe.fileno(), 1 << 20)
        if not chunk:
            raise BrokenPipeError("the process that renders templates has ended")
        chunks.append(chunk)
    return b"".join(chunks)


def _wait(pipe: IO[bytes], deadline: float, *, write: bool) -> None:
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLOUT if write else select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _too_much() -> RequestError:
    return RequestError("the adapter's chat template takes too much time or memory for these messages", "messages")


# -- in the process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """One JSON object a line in, one out, until the input ends."""
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
