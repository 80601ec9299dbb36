"""A trainer's publishes on a deployment that serves others: how soon a version answers, and what the others notice.

    python -m benchmarks.serving.publish [--publishes 50] [--rank 16] [--seconds 20] [--json FILE]
    loray bench publish …                                                               the same

A Ray cluster on this machine serves SmolLM2-135M as `loray up` does, and a trainer has an adapter on q, k, v, o.
Prompts have 64 tokens that no prefix cache holds, or 16 where it says so, and are sampled by calls of the gateway.

    resident       the first token with an adapter that the pool has
    publish        the trainer's call: weights in 16 bits, hashed, written into the node's cache
    published      from the beginning of that call to the first token under the new version, after a step of training
    between        two tokens of a stream over HTTP, alone and beside a run: groups of rollouts, steps of training,
                   publishes
    rollouts       tokens/s of rollouts without anything beside them, and of the same requests on an engine in a process

`mismatch` compares the log-probabilities of sampled tokens with those that the trainer computes of them under the same
weights: the mean and the largest difference. `rescored` counts the tokens whose bits the engine's own scoring changes.
No tokens are guessed, so that each has a time of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.client import Endpoint, Request
from benchmarks.report import Cell, Report, machine_line
from benchmarks.world import World, describe_machine, load_average, run_modules, started_cluster
from loray.bases.registry import get_base
from loray.catalog import Catalog
from loray.local.processes import free_ports
from loray.spec import (
    ATTENTION_MODULES,
    AdapterRef,
    FleetSpec,
    GenerateRequest,
    LoraSpec,
    SampleCall,
    SamplingParams,
    ServeSpec,
)
from loray.spec.datums import AdamParams, Datum, ForwardBackward, OptimStep

_PROMPT_TOKENS, _SHORT, _GROUP, _ANSWER = 64, 16, 8, 32
_GROUPS = 4  # at once
_KEEP = 3
_COLUMNS = ("what", "n", "p50\t.1f", "p99\t.1f", "mean\t.1f", "unit")
_ALONE = "alone"  # the mode in which the engine is in this process


class Bench:
    """The trainer, the sampler and the stream of one deployment. Used from one event loop."""

    def __init__(self, world: World, port: int, trainer: Any, resident: AdapterRef) -> None:
        from jobs.sampling import Sampler

        self.world, self.trainer, self.resident, self.sampler = world, trainer, resident, Sampler()
        self.endpoint = Endpoint(port)
        self._seq, self._prompts = itertools.count(1), itertools.count()
        self.published: list[str] = []
        self.version = resident

    def prompt(self, num_tokens: int = _PROMPT_TOKENS) -> tuple[int, ...]:
        most = self.world.base.config.vocab_size - 100
        return _prompt(next(self._prompts), most)[:num_tokens]

    def call(
        self, adapter: AdapterRef, num_samples: int = 1, num_tokens: int = _PROMPT_TOKENS, **params: Any
    ) -> SampleCall:
        given = SamplingParams(**{"max_tokens": 1, "ignore_eos": True, "seed": 0} | params)
        prompt = self.prompt(num_tokens)
        return SampleCall(
            base=self.world.base.name, adapter=adapter, prompt_ids=prompt, params=given, num_samples=num_samples
        )

    async def first_token_s(self, adapter: AdapterRef, num_tokens: int = _PROMPT_TOKENS) -> float:
        call, began = self.call(adapter, num_tokens=num_tokens), time.perf_counter()
        await self.sampler.sample(call)
        return time.perf_counter() - began

    async def train(self) -> None:
        """Change the weights by a step on some tokens."""
        ids = np.array(self.prompt())
        await self._do(ForwardBackward("bench", (Datum(ids[:-1], ids[1:]),)))
        await self._do(OptimStep("bench", AdamParams(learning_rate=1e-4)))

    async def publish(self, num_tokens: int = _PROMPT_TOKENS) -> tuple[float, float]:
        """Publish the weights, and sample a token. Returns the seconds of the publish, and of both."""
        began = time.perf_counter()
        self.version, _ = await self.trainer.publish.remote("bench", keep=_KEEP)
        published_s = time.perf_counter() - began
        await self.first_token_s(self.version, num_tokens)
        seconds = time.perf_counter() - began
        self.published.append(self.version.digest)
        await self.sampler.retire(self.published[:-_KEEP])
        del self.published[:-_KEEP]
        return published_s, seconds

    async def group(self) -> None:
        await self.sampler.sample(self.call(self.version, _GROUP, max_tokens=_ANSWER))

    async def run(self, over: asyncio.Event) -> None:
        """What a run does: groups are sampled ahead while the trainer steps, and each step is published."""
        while not over.is_set():
            groups = [asyncio.create_task(self.group()) for _ in range(_GROUPS)]
            await self.train()
            await asyncio.gather(*groups)
            await self.publish()

    async def stream(self, name: str, seconds: float) -> list[float]:
        """Times between two tokens of one stream after another."""
        gaps: list[float] = []
        began = time.perf_counter()
        while time.perf_counter() < began + seconds:
            _, (answer,) = await self.endpoint.send([Request(0.0, name, self.prompt(), 128)])
            if answer.error:
                raise SystemExit(f"the stream failed: {answer.error}")
            gaps += [b - a for a, b in itertools.pairwise(answer.times)]
        return gaps

    async def mismatch(self) -> tuple[list[float], int]:
        """Differences of the trainer's log-probabilities from the sampler's, and the number of tokens whose bits are
        others when the engine scores them.
        """
        differences, num_rescored = [], 0
        for _ in range(_GROUPS):
            call = self.call(self.version, _GROUP, max_tokens=_ANSWER)
            result = await self.sampler.sample(call)
            rows = [np.array([*call.prompt_ids, *sequence.token_ids]) for sequence in result.sequences]
            datums = tuple(Datum(row[:-1], row[1:]) for row in rows)
            output = await self._do(ForwardBackward("bench", datums, forward_only=True))
            for row, sequence, logprobs in zip(rows, result.sequences, output.logprobs, strict=True):
                differences += np.abs(logprobs[-_ANSWER:] - np.array(sequence.logprobs)).tolist()
                scoring = SamplingParams(max_tokens=0, prompt_logprobs=0)
                whole = SampleCall(base=call.base, adapter=call.adapter, prompt_ids=tuple(row.tolist()), params=scoring)
                scored = (await self.sampler.sample(whole)).prompt_logprobs
                assert scored is not None
                num_rescored += sum(a != b for a, b in zip(scored[-_ANSWER:], sequence.logprobs, strict=True))
        return differences, num_rescored

    async def _do(self, op: Any) -> Any:
        number = next(self._seq)
        await self.trainer.submit.remote("bench", number, op)
        while (result := await self.trainer.result.remote("bench", number, 60.0)) is None:
            pass
        return result


async def tokens_per_s(group: Callable[[], Awaitable[None]], seconds: float) -> float:
    """Generate groups, several at once, until the time is over and those under way have ended. Returns tokens/s."""
    began, num = time.perf_counter(), 0

    async def generate() -> None:
        nonlocal num
        while time.perf_counter() < began + seconds:
            await group()
            num += 1

    await asyncio.gather(*(generate() for _ in range(_GROUPS)))
    return num * _GROUP * _ANSWER / (time.perf_counter() - began)


def _prompt(number: int, most: int) -> tuple[int, ...]:
    return tuple((7919 * number + 31 * k) % most + 100 for k in range(_PROMPT_TOKENS))


def main(argv: Sequence[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishes", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each stream, and of the rollouts")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    machine = describe_machine()
    click.echo(machine_line(machine))
    before = load_average()
    from peft import LoraConfig

    adapter = LoraConfig(r=args.rank, target_modules=list(ATTENTION_MODULES))
    with started_cluster(1, 4, adapter, base="smollm2", source="smollm2") as world:
        port = free_ports(1)[0]
        most = _GROUP * _GROUPS + 1  # and the stream
        spec = ServeSpec(base="smollm2", port=port, dtype=args.dtype, max_num_seqs=most, speculation="off")
        alone = {"home": str(world.settings.home), "spec": spec.model_dump(mode="json"), "seconds": args.seconds}
        (engine,) = run_modules([["benchmarks.serving.publish", _ALONE, json.dumps(alone)]])
        with world.deployed(FleetSpec.of(spec)):
            rows = asyncio.run(_measure(world, port, args, engine["rate"]))
    arguments = " ".join(sys.argv[1:] if argv is None else argv)
    report = Report(machine, _COLUMNS, rows, arguments, {"load": before})
    click.echo(report.text())
    report.write(args.json)
    return report


async def _measure(world: World, port: int, args: argparse.Namespace, engine_rate: float) -> list[list[Cell]]:
    import ray

    from jobs.trainer import trainer_of

    ray.init(address=world.local.gcs_address, log_to_driver=False, logging_level="ERROR")
    try:
        trainer = await asyncio.to_thread(trainer_of, world.base.name, args.dtype)
        spec = LoraSpec(method="lora", rank=args.rank, target_modules=ATTENTION_MODULES)
        await trainer.create.remote("bench", spec.model_dump(mode="json"), 0)
        resident = Catalog(world.settings.catalog).adapters.resolve(world.names[0])
        bench = Bench(world, port, trainer, resident)
        for _ in range(3):
            await bench.train()
            await bench.publish()
            await bench.first_token_s(resident)
        rows = []
        for num_tokens, of in ((_PROMPT_TOKENS, ""), (_SHORT, f", {_SHORT} tokens")):
            warm, published, both = [], [], []
            for _ in range(args.publishes):
                warm.append(await bench.first_token_s(resident, num_tokens))
                await bench.train()
                publish_s, seconds = await bench.publish(num_tokens)
                published.append(publish_s)
                both.append(seconds)
            rows += [_ms(f"resident{of}", warm), _ms(f"publish{of}", published), _ms(f"published{of}", both)]
        rows.append(_ms("between, alone", await bench.stream(resident.name, args.seconds)))
        over = asyncio.Event()
        run = asyncio.create_task(bench.run(over))
        rows.append(_ms("between, beside a run", await bench.stream(resident.name, args.seconds)))
        over.set()
        await run
        rate = await tokens_per_s(bench.group, args.seconds)
        rows.append(["rollouts", None, None, None, rate, "tokens/s"])
        rows.append(["the engine alone", None, None, None, engine_rate, "tokens/s"])
        differences, num_rescored = await bench.mismatch()
        mean, most = statistics.fmean(differences), max(differences)
        rows.append(["mismatch, mean", len(differences), None, None, 1e6 * mean, "1e-6"])
        rows.append(["mismatch, largest", len(differences), None, None, 1e6 * most, "1e-6"])
        rows.append(["rescored with other bits", len(differences), None, None, num_rescored, "tokens"])
    finally:
        ray.shutdown()
    return rows


def _ms(what: str, seconds: Sequence[float]) -> list[Cell]:
    p50, p99 = (float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    return [what, len(seconds), 1e3 * p50, 1e3 * p99, 1e3 * statistics.fmean(seconds), "ms"]


def _alone(home: str, spec: dict[str, Any], seconds: float) -> None:
    """Print the tokens/s of an engine in this process that generates the same groups, all of one adapter."""
    from loray.settings import Settings
    from serve_apps.replica.startup import adapter_loader, set_num_threads, start_engine

    fleet = set_num_threads(ServeSpec.model_validate(spec))
    settings = Settings.from_env({"LORAY_HOME": home})
    base = get_base(settings.home, fleet.base)
    (name,) = (model.name for model in Catalog(settings.catalog).snapshot().models())
    ref = Catalog(settings.catalog).adapters.resolve(name)
    stream = start_engine(fleet, base, adapter_loader(base, settings))
    most, numbers = base.config.vocab_size - 100, itertools.count()

    async def answer(request: GenerateRequest) -> None:
        async for _ in stream.generate(request):
            pass

    async def group() -> None:
        number = next(numbers)
        params = [SamplingParams(max_tokens=_ANSWER, ignore_eos=True, seed=i, logprobs=0) for i in range(_GROUP)]
        prompt = _prompt(number, most)
        asked = [GenerateRequest(f"{number}-{i}", prompt, own, ref) for i, own in enumerate(params)]
        await asyncio.gather(*map(answer, asked))

    async def measure() -> float:
        await tokens_per_s(group, seconds / 4)  # warms up
        return await tokens_per_s(group, seconds)

    rate = asyncio.run(measure())
    stream.stop()
    click.echo(json.dumps({"rate": rate}))


if __name__ == "__main__":
    if sys.argv[1:2] == [_ALONE]:
        _alone(**json.loads(sys.argv[2]))
    else:
        main()
