"""Eight clients of Tinker's SDK with ranks of their own: steps a second beside those of clients that take turns, what
an operation costs beside its computation, and the time from a publish to the first token.

It needs `loray up`, and an environment with the SDK (`pip install tinker==0.38.0`). With the deployment's LORAY_HOME:

    python -m benchmarks.serving.tinker --python /path/of/the/environment/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.world import describe_machine
from loray.local.cluster import current_cluster
from loray.settings import Settings
from loray.spec import LoraSpec
from loray.spec.datums import Datum, ForwardBackward

_CLIENT = Path(__file__).with_name("tinker_client.py")
PASSES, NUM_TOKENS, RANK = 100, 32, 16  # of the client's single passes
_MODEL = "benchmark-of-the-protocol"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="the interpreter of an environment with Tinker's SDK")
    parser.add_argument("--url", default="http://127.0.0.1:8000/tinker")
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env.setdefault("TINKER_API_KEY", "tml-benchmark")
    # As a text, because beside its file this module would be the one named `tinker`.
    client = _CLIENT.read_text(encoding="utf-8")
    command = [args.python, "-W", "ignore", "-c", client, args.url, args.base, str(args.steps)]
    pipe = subprocess.PIPE
    cluster = current_cluster(Settings.from_env().home)
    if cluster is None:
        raise SystemExit("no cluster runs in this LORAY_HOME: `loray up` first")
    os.environ.update(cluster.client_env)
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True, bufsize=1) as running:
        told, computing_s = asyncio.run(passes_beside(running, args.base, cluster.gcs_address))
    sys.stdout.write(json.dumps(describe_machine() | summary(told, computing_s), indent=2) + "\n")


def summary(told: dict[str, Any], computing_s: list[float]) -> dict[str, Any]:
    """The figures of a run. `computing_s`: seconds of the client's pass in the trainer itself."""
    mixed, turns = told["mixed"], told["one at a time"]
    medians = [statistics.median(seconds) for seconds in mixed["seconds"]]
    lone, of_eight = told["alone"][1:], mixed["losses"][2]
    return {
        "sdk": told["sdk"],
        "ranks": told["ranks"],
        "tokens_per_step": told["num_tokens"],
        "steps_per_s": {"mixed": mixed["steps_per_s"], "one at a time": turns["steps_per_s"]},
        "times_faster": mixed["steps_per_s"] / turns["steps_per_s"],
        "longest_wait_of_median": max(map(max, mixed["seconds"])) / statistics.median(medians),
        "loss_difference_to_a_lone_client": max(abs(a - b) for a, b in zip(of_eight, lone, strict=True)),
        "pass_s": statistics.median(told["pass_s"]),
        "overhead_of_a_pass_s": overhead(told["pass_s"], computing_s),
        "first_token_s": quantiles(told["first_token_s"]),
        "publish_to_first_token_s": quantiles(told["publish_to_first_token_s"]),
    }


def overhead(pass_s: list[float], computing_s: list[float]) -> float:
    """Return the median of what each of the client's passes took more than its two neighbours in the trainer itself.

    A pass varies within a minute by more than the protocol costs; neighbours share what slows them.
    """
    neighbours = zip(pass_s, computing_s, computing_s[1:], strict=False)
    return statistics.median(taken - (before + after) / 2 for taken, before, after in neighbours)


def quantiles(seconds: list[float]) -> dict[str, float]:
    return {name: float(np.quantile(seconds, q)) for name, q in (("p50", 0.5), ("p99", 0.99))}


async def passes_beside(client: subprocess.Popen[str], base: str, address: str) -> tuple[dict[str, Any], list[float]]:
    """Return what the client tells, and the seconds of its pass where this process asks the trainer itself, in turn
    with the client, less those of two calls of it.
    """
    assert client.stdin is not None
    assert client.stdout is not None
    import ray

    from jobs.trainer import TrainerClient, trainer_of

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    tokens = np.arange(100, 100 + NUM_TOKENS + 1)
    row = Datum(tokens[:-1], tokens[1:])
    trainer: Any = None
    found: list[float] = []
    for line in client.stdout:
        if told := line.strip():
            return json.loads(told), found
        if trainer is None:
            trainer = TrainerClient(await asyncio.to_thread(trainer_of, base))
            await trainer.create(_MODEL, LoraSpec(rank=RANK).model_dump(mode="json"), 0, None)
        seq = len(found) + 1
        began = time.perf_counter()
        await trainer.submit(_MODEL, seq, ForwardBackward(_MODEL, (row,), forward_only=True))
        await trainer.result(_MODEL, seq, 60.0)
        done = time.perf_counter()
        for _ in range(2):
            await trainer.result(_MODEL, seq, 60.0)
        found.append(2 * done - began - time.perf_counter())
        if len(found) == PASSES:
            await trainer.remove(_MODEL)
        client.stdin.write("\n")
        client.stdin.flush()
    raise SystemExit("the client ended before its time")


if __name__ == "__main__":
    main()
