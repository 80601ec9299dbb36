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

from loray.errors import RequestError
from loray.text.templates import ChatTemplate

MAX_PROMPT_CHARACTERS = 16 << 20
_TIMEOUT_S = 5.0  # of one prompt; the first one also starts the process
_MEMORY_BYTES = 1 << 30  # of the process's address space
_REFUSED_S = 60.0  # for which a template that was stopped is not tried again


class IsolatedRenderer:
    """Renders one template at a time; may be used by several threads. There is no process before the first one."""

    def __init__(self, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._refused: dict[str, float] = {}  # a template's source → until when
        self._lock = threading.Lock()

    def render(self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """As `ChatTemplate.render`. Raises RequestError also for a template that takes too much time or memory."""
        task = {"source": template.source, "special_tokens": template.special_tokens, "messages": messages}
        line = json.dumps(task | {"options": options}).encode() + b"\n"
        with self._lock:
            if self._refused.get(template.source, 0.0) > time.monotonic():
                raise _too_much()
            try:
                answer = json.loads(self._ask(line))
            except (OSError, ValueError):
                self._stop()
                self._refused = {s: until for s, until in self._refused.items() if until > time.monotonic()}
                self._refused[template.source] = time.monotonic() + _REFUSED_S
                raise _too_much() from None
        if "error" in answer:
            raise RequestError(answer["error"], answer["param"])
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ask(self, line: bytes) -> bytes:
        """The process's answer to one line. Raises OSError (TimeoutError too) if there is none."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for the server, which lets its requests end
            )
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        deadline = time.monotonic() + self._timeout_s
        _write(stdin, line, deadline)
        return _read_line(stdout, deadline)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


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
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
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
