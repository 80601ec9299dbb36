"""A hostile client with keys of every kind: requests drawn from OpenAPI documents, valid ones and invalid ones of every
operation, equal for equal seeds; and the process that sends them, so that what it computes holds up nobody else.

`python -m tests.faults.hostile FILE PORT AT_ONCE NICE` sends the requests of the file, so many at once, when its
standard input has a line, and prints what was answered.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote, urlsplit

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from loray.catalog import Catalog
from loray.local.processes import LOOPBACK
from loray.spec import Limits
from tests.fixtures.openapi import WRONG

NUM_STREAMS = 10
_NUM_OWN = 40  # adapters and keys of the hostile tenant, which deletes and revokes them
HOSTILE, OTHER = "hostile", "other"  # tenants
ADMINISTRATORS = ("administrator", "administrator of another tenant")  # whom nothing protects the well-behaved from
_ALL = ["infer", "publish", "promote", "train"]
_KEYS: Mapping[str, Mapping[str, Any]] = {
    "infer": {"scopes": ["infer"]},
    "infer of one model": {"scopes": ["infer"]},
    "publish": {"scopes": ["publish"]},
    "promote": {"scopes": ["promote"]},
    "train": {"scopes": ["train"]},
    "tenant's": {"scopes": _ALL},
    "of a tenant with limits": {"scopes": _ALL, "tenant": OTHER},
    "administrator of another tenant": {"scopes": ["admin"], "tenant": OTHER},
    "administrator": {"scopes": ["infer", "admin"]},
}
_LIMITS = Limits(rpm_limit=60, tpm_limit=10_000, max_parallel_requests=2, max_adapters=4, max_jobs=0)
_READ_S = 10.0  # in which it reads an answer, and then leaves
_ANSWER_S = 60.0  # in which an answer has to begin
_READ_BYTES = 1 << 20
_OWN_HEADERS = ("X-Schemathesis-TestCaseId", "Connection", "Accept-Encoding", "Content-Length")
_KNOWN_SHARE = 0.5  # of the values that name something: what exists
_FEW_SHARE = 0.2  # of a body's other fields: all seldom fit together
_PLAIN: Mapping[str, Any] = {  # for drawn ones, which seldom are tokens of the base or a conversation
    "prompt": "I am hostile",
    "messages": [{"role": "user", "content": "I am hostile"}],
    "input": "I am hostile",
    "tokens": [40, 41, 42],
}


@dataclass(frozen=True)
class Callers:
    """`headers`: by kind of caller, the hostile client's. `known`: by kind of caller, values of parameters that exist,
    by parameter. `models`: those that the hostile client asks. `streams`: by tenant, the well-behaved one's secret.
    """

    headers: Mapping[str, Mapping[str, str]]
    known: Mapping[str, Mapping[str, Sequence[str]]]
    models: Sequence[str]
    streams: Mapping[str, str]


def make_callers(catalog: Catalog, base: str, names: Sequence[str]) -> Callers:
    """Makes tenants and keys. `names`: adapters of the tenant `default`, which everybody asks from now on.

    Administrators are given names of the hostile tenant alone: they may delete whatever they name.
    """
    for name in names:
        catalog.adapters.share(name, "public")
    for tenant in (HOSTILE, OTHER):
        catalog.tenants.create(tenant, _LIMITS if tenant == OTHER else None)
    own = [f"{HOSTILE}/tone-{number}" for number in range(_NUM_OWN)]
    versions = [catalog.adapters.version(name, 1) for name in names[:2]]
    for name in own:
        for version in versions:
            catalog.adapters.register(name, version.digest, version.manifest, ["prod"])
        catalog.tags.set(name, "team", "support")
    headers: dict[str, dict[str, str]] = {"none": {}, "wrong": {"Authorization": f"Bearer {WRONG}"}}
    for kind, fields in _KEYS.items():
        more = {"models": [names[0]]} if kind == "infer of one model" else {}
        secret = catalog.keys.create(kind.replace("'", ""), **{"tenant": HOSTILE} | fields | more).secret
        headers[kind] = {"Authorization": f"Bearer {secret}"}
    spare = [catalog.keys.create(f"spare-{number}", tenant=HOSTILE).key.id for number in range(_NUM_OWN)]
    streams, ids = {}, []
    for tenant in (f"steady-{number}" for number in range(NUM_STREAMS)):
        catalog.tenants.create(tenant)
        key = catalog.keys.create(tenant, tenant=tenant)
        streams[tenant] = key.secret
        ids.append(key.key.id)
    models, short = [base, *names, *own[:NUM_STREAMS]], [name.partition("/")[2] for name in own]
    common: dict[str, Sequence[str]] = {"alias": ["prod"], "version": ["1", "2"], "key": ["team"], "model": models}
    harmless = common | {"name": short, "id": spare, "tenant": [HOSTILE]}
    anything = common | {"name": [*short, *names, *streams], "id": [*spare, *ids], "tenant": [HOSTILE, *streams]}
    known = {kind: harmless if kind in ADMINISTRATORS else anything for kind in headers}
    return Callers(headers, known, models, streams)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `caller`: whose key it has. `operation`: of the document. `target`: path and query."""

    caller: str
    operation: str
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"body": base64.b64encode(self.body).decode()})

    @classmethod
    def from_json(cls, line: str) -> Self:
        fields = json.loads(line)
        return cls(**fields | {"body": base64.b64decode(fields["body"])})


def draw(documents: Mapping[str, Any], callers: Callers, num: int, number: int) -> list[Asked]:
    """`num` requests in random order. `documents`: by the path before their operations; `number`: the seed.

    Each operation has as many as any other, half of them invalid by its schema.
    """
    chance = random.Random(number)
    strategies = [each for item in documents.items() for each in _strategies(*item)]
    chance.shuffle(strategies)  # where there are fewer requests than operations
    found = []
    for place, (operation, prefix, strategy) in enumerate(strategies):
        for case in _cases(strategy, (num - place - 1) // len(strategies) + 1, number):
            found.append(_asked(case, operation, prefix, callers, chance))
    chance.shuffle(found)
    return found


def _strategies(prefix: str, document: Any) -> Iterator[tuple[str, str, Any]]:
    """The operations in both modes."""
    schema = schemathesis.openapi.from_dict(document)
    schema.config.generation.update(with_security_parameters=False)
    for path, methods in document["paths"].items():
        for method in methods:
            operation = schema[path][method.upper()]
            for mode in GenerationMode:
                if mode is GenerationMode.NEGATIVE and not _takes_anything(operation):
                    continue
                yield f"{method.upper()} {prefix}{path}", prefix, operation.as_strategy(generation_mode=mode)


def _takes_anything(operation: Any) -> bool:
    return bool(operation.body) or any(True for _ in operation.iter_parameters())


def _cases(strategy: Any, num: int, number: int) -> list[Any]:
    """Fewer, where there are not as many; the first are Hypothesis' simplest."""
    found: list[Any] = []
    if num < 1:
        return found

    @seed(number)
    @settings(
        max_examples=num, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=strategy)
    def collect(case: Any) -> None:
        found.append(case)

    with suppress(Unsatisfiable):  # what takes any text has no invalid request
        collect()
    return found


def _asked(case: Any, operation: str, prefix: str, callers: Callers, chance: random.Random) -> Asked:
    caller = chance.choice(list(callers.headers))
    _name_what_exists(case, caller, callers, chance)
    fields = case.as_transport_kwargs(base_url=f"http://127.0.0.1{prefix}")
    fields["headers"] = {k: _text(v) for k, v in fields["headers"].items() if k not in _OWN_HEADERS}
    made = requests.Request(**fields).prepare()
    headers = {k: v for k, v in made.headers.items() if k not in _OWN_HEADERS}
    parts = urlsplit(str(made.url))
    body = made.body or b""
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    content = body.encode() if isinstance(body, str) else bytes(body)
    return Asked(caller, operation, str(made.method), target, headers | dict(callers.headers[caller]), content)


def _name_what_exists(case: Any, caller: str, callers: Callers, chance: random.Random) -> None:
    """So that a part of the requests get further than to a name."""
    known = callers.known[caller]
    if isinstance(case.path_parameters, dict):
        for name, values in known.items():
            if name in case.path_parameters and chance.random() < _KNOWN_SHARE:
                case.path_parameters[name] = quote(chance.choice(values), safe="")  # as the drawn ones are
    for parameter in case.operation.query:
        if parameter.name in known and chance.random() < _KNOWN_SHARE:
            case.query = case.query if isinstance(case.query, dict) else {}
            case.query[parameter.name] = chance.choice(known[parameter.name])
    if isinstance(case.body, dict) and "model" in case.body and chance.random() < _KNOWN_SHARE:
        few = {name: value for name, value in case.body.items() if chance.random() < _FEW_SHARE}
        asked = {name: plain for name, plain in _PLAIN.items() if name in case.body}
        case.body = few | asked | {"model": chance.choice(callers.models)}


def _text(value: Any) -> str:
    """Of a header: without the ends of lines that would make it two."""
    return str(value).replace("\r", " ").replace("\n", " ").encode("latin-1", "replace").decode("latin-1").strip()


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


@contextmanager
def sender(asked: Sequence[Asked], folder: Path, port: int, at_once: int, nice: int) -> Iterator[subprocess.Popen[str]]:
    """Started at once, so that its start disturbs nobody; see `go`. `nice`: how far it stands back from the servers,
    with which it shares the processors.
    """
    file = folder / "requests.jsonl"
    file.write_text("".join(f"{one.to_json()}\n" for one in asked), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.hostile"]
    command += [str(file), str(port), str(at_once), str(nice)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def go(process: subprocess.Popen[str]) -> Told:
    """Blocks until all have been answered."""
    said, _ = process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"the sender ended with {process.returncode}")
    told = Told(**json.loads(said))
    told.sent = [Sent(*one) for one in told.sent]
    return told


def problem(head: bytes) -> str | None:
    """What is wrong with an answer of which this is the status line with the headers; None: it may be."""
    status, names = int(head.split()[1]), head.lower()
    if status == 503:
        return None if b"\r\nretry-after:" in names else "503 without Retry-After"
    return str(status) if status >= 500 else None


async def _send(number: int, one: Asked, port: int, told: Told) -> None:
    began, why = time.perf_counter(), None
    head = body = b""
    fields = {"Host": f"{LOOPBACK}:{port}", "Connection": "close", **one.headers}
    if one.body or one.method in ("POST", "PUT", "PATCH"):
        fields["Content-Length"] = str(len(one.body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    request = f"{one.method} {one.target} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + one.body
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=_READ_BYTES)
            with suppress(ConnectionError):  # it may have answered before it has the body
                writer.write(request)
                await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
        why = problem(head)
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(_READ_S):
                while part := await reader.read(1 << 16):
                    body = (body + part)[-_READ_BYTES:]
    except (OSError, asyncio.IncompleteReadError) as e:  # a timeout too
        why = repr(e)
    finally:
        if writer is not None:
            writer.transport.abort()
    status = int(head.split(None, 2)[1]) if head else 0
    told.sent.append(Sent(number, one.operation, one.caller, status, began, time.perf_counter()))
    if why is not None:
        headers = {name: value for name, value in one.headers.items() if name != "Authorization"}
        asked = f"{one.method} {one.target} {headers} {one.body!r}"
        told.wrong.append(f"{why}: request {number}, {one.operation} ({one.caller}): {body[-600:]!r} ← {asked}")


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


if __name__ == "__main__":
    os.nice(int(sys.argv[4]))
    with suppress(OSError):  # a session's processes may share one place with the scheduler, with its own niceness
        Path("/proc/self/autogroup").write_text(sys.argv[4], encoding="ascii")
    sys.stdin.readline()
    found = asyncio.run(_send_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
