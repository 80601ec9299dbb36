"""A random run: clients of many manners, killed processes, and the verdict on each response."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.faults.client import PATIENT, Client, Manner, Reply
from tests.faults.requests import Answer, Kind, difference, read

NUM_CLIENTS = 12
_TENANTS = ("", "a", "b", "c")
_STRIKE_S = 8.0  # from the choice of a victim until clients have seen its end
_SETTLED_S = 3.0  # after a killed process has been replaced: calls that it had taken have ended


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: as its kind says, or streamed, by a client of some manner. `timeout_s`: its deadline.

    `is_hopeless`: its first token is wanted sooner than any engine can have it.
    """

    kind: Kind
    manner: Manner
    stream: bool = False
    usage: bool = False
    tenant: str = ""
    timeout_s: float | None = None
    is_hopeless: bool = False

    @property
    def body(self) -> bytes:
        more: dict[str, object] = {"stream": True} if self.stream else {}
        if self.usage:
            more["stream_options"] = {"include_usage": True}
        if self.is_hopeless:
            more["ttft_slo_s"] = 1e-6
        return json.dumps(self.kind.body | more).encode()

    @property
    def headers(self) -> dict[str, str]:
        headers = {"X-Tenant-Id": self.tenant} if self.tenant else {}
        return headers if self.timeout_s is None else headers | {"X-Request-Timeout-S": f"{self.timeout_s:.3f}"}


def random_request(kinds: Sequence[Kind], rng: random.Random) -> Asked:
    kind = rng.choice(kinds)
    stream = rng.random() < 0.6
    usage = stream and rng.random() < 0.5
    match rng.choices(["patient", "breaks off", "leaves", "slow", "stalls"], [78, 2, 12, 6, 2])[0]:
        case "breaks off":
            manner = Manner(sends=rng.randrange(1, 400))
        case "leaves":
            manner = Manner(leaves_after=rng.choice([0, 0, 1, 300, 3000, 30_000]))
        case "slow":
            manner = Manner(pause_s=rng.uniform(0.001, 0.02), read_bytes=rng.choice([512, 4096]))
        case "stalls":
            manner = Manner(stall_s=rng.uniform(0.2, 2.0), leaves_after=rng.choice([None, None, 1000]))
        case _:
            manner = PATIENT
    timeout_s = rng.choice([0.01, 0.05, 0.3, 1.0]) if rng.random() < 0.1 else None
    return Asked(kind, manner, stream, usage, rng.choice(_TENANTS), timeout_s, rng.random() < 0.03)


@dataclass
class Run:
    """`verdicts`: how requests ended. `wrong`: what no request may end in, in words. `windows`: when processes were
    killed, and when they had been replaced.
    """

    url: str
    kinds: list[Kind]
    references: dict[Kind, Answer]
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    windows: list[list[float]] = field(default_factory=list)

    def judge(self, asked: Asked, reply: Reply, begun: float, ended: float) -> str:
        """How the request ended. AssertionError if it may not end so.

        Without its end comes a response only of a gateway that was killed, or to a client that does not read until its
        deadline.
        """
        killed = any(w[0] <= ended and begun <= (w[1] if len(w) > 1 else ended) for w in self.windows)
        struck = any(begun <= w[0] + _STRIKE_S and w[0] <= ended <= w[0] + _STRIKE_S for w in self.windows)
        may_be_cut = reply.end == "left" or struck or (asked.manner.is_slow and (killed or asked.timeout_s is not None))
        if reply.status is None:
            assert may_be_cut, "no response"
            return "left before the response" if reply.end == "left" else "connection lost"
        if reply.end != "whole" and not reply.is_stream:
            assert may_be_cut, "a body that was cut"
            return reply.end
        answer = read(reply)
        is_part = reply.end != "whole" or answer.error is not None
        different = difference(answer, self.references[asked.kind], is_part=is_part)
        assert different is None, different
        if answer.error is not None:
            return self._refused(asked, reply, answer.error, killed=killed)
        if reply.end == "whole":
            assert answer.is_done, "a stream without its last event"
            assert reply.status == 200
            assert answer.usage is not None or (asked.stream and not asked.usage), "no usage"
            return "whole"
        assert may_be_cut, "a stream that was cut"
        return reply.end

    def _refused(self, asked: Asked, reply: Reply, error: dict[str, object], *, killed: bool) -> str:
        code = str(error["code"])
        assert error["message"], "an error without a reason"
        if reply.status != 200:
            assert (reply.status == 429) == (code == "overloaded")
            assert reply.status in (429, 503, 504), (reply.status, error)
            assert reply.status == 504 or int(reply.headers["retry-after"]) >= 1
        if code == "deadline_exceeded":
            assert asked.timeout_s is not None
        elif code == "adapter_quarantined":
            assert self.windows, error  # it lasts for a minute or longer
        elif code != "overloaded":
            assert (killed, code) == (True, "engine_unavailable"), error
        return code

    async def clients(self, requests: Iterator[Asked]) -> None:
        client = Client(self.url)
        for asked in requests:
            begun = time.monotonic()
            reply = await client.ask(asked.kind.path, asked.headers, asked.body, asked.manner)
            try:
                self.verdicts[self.judge(asked, reply, begun, time.monotonic())] += 1
            except (AssertionError, ValueError, KeyError) as e:
                self.verdicts["wrong"] += 1
                self.wrong.append(f"{e!r}: {asked} → {reply.status} {reply.end} {reply.body[-600:]!r}")
        client.close()

    async def _strike_now_and_then(self, every: int, strike: Callable[[], Awaitable[None]]) -> None:
        """Whenever `every` requests have ended since what was killed had been replaced."""
        while True:
            due = self.verdicts.total() + every
            while self.verdicts.total() < due:
                await asyncio.sleep(0.05)
            self.windows.append(window := [time.monotonic()])
            await strike()
            window.append(time.monotonic() + _SETTLED_S)

    async def all(self, num: int, seed: int, every: int, strike: Callable[[], Awaitable[None]] | None) -> None:
        """`num` requests of random clients. `strike`: kills processes, and returns when they have been replaced."""
        rng = random.Random(seed)
        requests = (random_request(self.kinds, rng) for _ in range(num))
        clients = asyncio.gather(*(self.clients(requests) for _ in range(NUM_CLIENTS)))
        killer = None if strike is None else asyncio.create_task(self._strike_now_and_then(every, strike))
        try:
            await clients
        finally:
            if killer is not None:
                killer.cancel()
        if killer is not None and killer.done() and not killer.cancelled():
            killer.result()
