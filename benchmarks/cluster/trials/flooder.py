"""A tenant that floods, in a process of its own: so many requests at once, each followed by the next.

`python -m benchmarks.cluster.trials.flooder JSON` with Flood's fields goes on until its standard input ends, and prints
what it was answered.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from benchmarks.cluster.trials.client import Client

_NUM_PROMPTS, _NUM_IDS = 64, 256
_END_S = 60.0


@dataclass(frozen=True, slots=True)
class Flood:
    """A refused request comes again after as long as the server says, as OpenAI's client does."""

    port: int
    key: str
    models: Sequence[str]
    at_once: int
    num_prompt: int
    num_output: int


@dataclass
class Told:
    """Of requests that have ended, by HTTP status; 0: no answer. `cpu_s`: what the client took of a processor."""

    statuses: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Told) -> Told:
        statuses = Counter(self.statuses) + Counter(other.statuses)
        return Told(dict(statuses), self.seconds + other.seconds, self.cpu_s + other.cpu_s)

    @property
    def num_answered(self) -> int:
        return self.statuses.get("200", 0)

    @property
    def cores(self) -> float:
        """That the client took, on average."""
        return self.cpu_s / self.seconds if self.seconds else 0.0

    @property
    def num_refused(self) -> int:
        return self.statuses.get("429", 0)


@contextmanager
def flooding(flood: Flood) -> Iterator[Told]:
    """Floods during the block; what it returned is known after it."""
    told = Told()
    command = [sys.executable, "-m", "benchmarks.cluster.trials.flooder", json.dumps(asdict(flood))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield told
            said, _ = process.communicate(timeout=_END_S)
        finally:
            process.kill()
    found = json.loads(said)
    told.statuses, told.seconds, told.cpu_s = found["statuses"], found["seconds"], found["cpu_s"]


async def _flood(flood: Flood) -> Told:
    chance, client = random.Random(flood.port), Client(flood.port, flood.key)
    began, cpu_s = time.perf_counter(), time.process_time()
    prompts = [[chance.randrange(_NUM_IDS) for _ in range(flood.num_prompt)] for _ in range(_NUM_PROMPTS)]
    statuses: Counter[str] = Counter()

    async def one() -> None:
        while True:
            model = chance.choice(flood.models)
            answer = await client.ask(model, chance.choice(prompts), flood.num_output, began)
            statuses[str(answer.status)] += 1
            if answer.error:
                await asyncio.sleep(answer.retry_after_s if math.isfinite(answer.retry_after_s) else 1.0)

    tasks = [asyncio.create_task(one()) for _ in range(flood.at_once)]
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Told(dict(statuses), time.perf_counter() - began, time.process_time() - cpu_s)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(asyncio.run(_flood(Flood(**json.loads(sys.argv[1])))))) + "\n")
