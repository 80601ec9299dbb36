"""The hostile client, in a process of its own, so that what it computes holds up no reader of streams.

`python -m benchmarks.fuzzing.sender FILE PORT AT_ONCE` sends the requests of the file, so many at once, when its
standard input has a line, and prints what was answered.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.fuzzing.requests import Asked

_READ_S = 10.0  # in which it reads an answer, and then leaves
_ANSWER_S = 60.0  # in which an answer has to begin
_READ_BYTES = 1 << 20
_MOST_WRONG = 100


@dataclass
class Told:
    """`statuses`: how many answers of each. `wrong`: what no request may be answered, in words, without repetitions."""

    statuses: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    num_wrong: int = 0


class Sender:
    """Started at once, so that its start disturbs nobody; sends with `go`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def go(self) -> Told:
        """Blocks until all have been answered."""
        said, _ = self._process.communicate("go\n")
        if self._process.returncode:
            raise RuntimeError(f"the sender ended with {self._process.returncode}")
        return Told(**json.loads(said))


@contextmanager
def sender(asked: Sequence[Asked], folder: Path, port: int, at_once: int) -> Iterator[Sender]:
    file = folder / "requests.jsonl"
    file.write_text("".join(f"{one.to_json()}\n" for one in asked), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.fuzzing.sender", str(file), str(port), str(at_once)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
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
    return str(status) if status >= 500 and status != 507 else None


async def _send(one: Asked, port: int, told: Told, statuses: Counter[str]) -> None:
    fields = {"Host": f"127.0.0.1:{port}", "Connection": "close"} | dict(one.headers)
    if one.body or one.method in ("POST", "PUT", "PATCH"):
        fields["Content-Length"] = str(len(one.body))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=_READ_BYTES)
    try:
        with suppress(ConnectionError):  # it may have answered before it has the body
            writer.write(f"{one.method} {one.target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + one.body)
            await writer.drain()
        try:
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _ANSWER_S)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError) as e:
            statuses["no answer"] += 1
            _note(told, one, repr(e), b"")
            return
        statuses[answer.split(None, 2)[1].decode()] += 1
        body = b""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_READ_S):
                while part := await reader.read(1 << 16):
                    body = (body + part)[-_READ_BYTES:]
        why = problem(answer)
        if why is not None:
            _note(told, one, why, body)
    finally:
        writer.transport.abort()


def _note(told: Told, one: Asked, why: str, body: bytes) -> None:
    told.num_wrong += 1
    if len(told.wrong) < _MOST_WRONG:
        asked = f"{one.operation} ({one.caller}): {one.method} {one.target[:300]} {one.body[:300]!r}"
        told.wrong.append(f"{why}: {asked} → {body[-600:]!r}")


async def _send_all(file: Path, port: int, at_once: int) -> Told:
    told, statuses = Told(), Counter[str]()
    asked = iter(file.read_text(encoding="utf-8").splitlines())

    async def client() -> None:
        for line in asked:
            await _send(Asked.from_json(line), port, told, statuses)

    await asyncio.gather(*(client() for _ in range(at_once)))
    told.statuses = dict(sorted(statuses.items()))
    return told


if __name__ == "__main__":
    sys.stdin.readline()
    found = asyncio.run(_send_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
