"""The hostile client, in a process of its own, so that what it computes holds up no reader of streams.

`python -m benchmarks.fuzzing.sender FILE PORT AT_ONCE NICE` sends the requests of the file, so many at once, when its
standard input has a line, and prints what was answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.fuzzing.requests import Asked

_READ_S = 10.0  # in which it reads an answer, and then leaves
_ANSWER_S = 60.0  # in which an answer has to begin
_READ_BYTES = 1 << 20
_AUTOGROUP = Path("/proc/self/autogroup")


class Sent(NamedTuple):
    """One request and its answer. `number`: its place among those drawn. `began`, `ended`: of `time.perf_counter`.
    `status`: 0 where none came in time.
    """

    number: int
    operation: str
    caller: str
    status: int
    began: float
    ended: float


@dataclass
class Told:
    """`sent` in the order of their ends. `wrong`: what no request may be answered, in words. `cores`: processors that
    the hostile client itself kept busy.
    """

    sent: list[Sent] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cores: float = 0.0


class Sender:
    """Started at once, so that its start disturbs nobody; sends with `go`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def go(self) -> Told:
        """Blocks until all have been answered."""
        said, _ = self._process.communicate("go\n")
        if self._process.returncode:
            raise RuntimeError(f"the sender ended with {self._process.returncode}")
        told = Told(**json.loads(said))
        told.sent = [Sent(*one) for one in told.sent]
        return told


@contextmanager
def sender(asked: Sequence[Asked], folder: Path, port: int, at_once: int, nice: int) -> Iterator[Sender]:
    """`nice`: how far it stands back from the servers, with which it shares the processors."""
    file = folder / "requests.jsonl"
    file.write_text("".join(f"{one.to_json()}\n" for one in asked), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzzing.sender"]
    command += [str(file), str(port), str(at_once), str(nice)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            yield Sender(process)
        finally:
            process.kill()


def problem(head: bytes) -> str | None:
    """What is wrong with an answer of which this is the status line with the headers; None: it may be."""
    lines = head.decode("latin-1").split("\r\n")
    status = int(lines[0].split()[1])
    names = {line.partition(":")[0].lower() for line in lines[1:]}
    if status == 503:
        return None if "retry-after" in names else "503 without Retry-After"
    return str(status) if status >= 500 else None


async def _send(number: int, one: Asked, port: int, told: Told) -> None:
    began = time.perf_counter()
    head, body = b"", b""
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_READ_BYTES)
    except (TimeoutError, OSError) as e:
        why: str | None = repr(e)
    else:
        try:
            head, why = await _answer(one, port, reader, writer)
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(_READ_S):
                    while part := await reader.read(1 << 16):
                        body = (body + part)[-_READ_BYTES:]
        finally:
            writer.transport.abort()
    status = int(head.split(None, 2)[1]) if head else 0
    told.sent.append(Sent(number, one.operation, one.caller, status, began, time.perf_counter()))
    if why is not None:
        headers = {name: value for name, value in one.headers.items() if name != "Authorization"}
        asked = f"{one.method} {one.target} {headers} {one.body!r}"
        told.wrong.append(f"{why}: request {number}, {one.operation} ({one.caller}): {body[-600:]!r} ← {asked}")


async def _answer(
    one: Asked, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[bytes, str | None]:
    """The answer's head, and what is wrong with it; no head where none came."""
    fields = {"Host": f"127.0.0.1:{port}", "Connection": "close"} | dict(one.headers)
    if one.body or one.method in ("POST", "PUT", "PATCH"):
        fields["Content-Length"] = str(len(one.body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    try:
        async with asyncio.timeout(_ANSWER_S):
            with suppress(ConnectionError):  # it may have answered before it has the body
                writer.write(f"{one.method} {one.target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + one.body)
                await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
    except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as e:
        return b"", repr(e)
    return head, problem(head)


async def _send_all(file: Path, port: int, at_once: int) -> Told:
    told = Told()
    asked = enumerate(file.read_text(encoding="utf-8").splitlines())
    began, cpu_s = time.perf_counter(), time.process_time()

    async def client() -> None:
        for number, line in asked:
            await _send(number, Asked.from_json(line), port, told)

    await asyncio.gather(*(client() for _ in range(at_once)))
    told.seconds = time.perf_counter() - began
    told.cores = (time.process_time() - cpu_s) / told.seconds
    return told


def _stand_back(nice: int) -> None:
    """A session's processes may share one place with the scheduler, which has a niceness of its own."""
    os.nice(nice)
    with suppress(OSError):
        _AUTOGROUP.write_text(str(nice), encoding="ascii")


if __name__ == "__main__":
    _stand_back(int(sys.argv[4]))
    sys.stdin.readline()
    found = asyncio.run(_send_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
