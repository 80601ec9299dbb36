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
_PASSES = 50
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
    # From its standard input, because beside its file this module would be the one named `tinker`.
    command = [args.python, "-W", "ignore", "-", args.url, args.base, str(args.steps)]
    client = _CLIENT.read_text(encoding="utf-8")
    printed = subprocess.run(command, env=env, check=True, input=client, stdout=subprocess.PIPE, text=True).stdout
    told = json.loads(printed.splitlines()[-1])
    direct_s = passes_beside(args.base, told["ranks"][2], told["num_tokens"])
    sys.stdout.write(json.dumps(describe_machine() | summary(told, direct_s), indent=2) + "\n")


def summary(told: dict[str, Any], direct_s: list[float]) -> dict[str, Any]:
    """The figures of a run. `direct_s`: seconds of the same pass where the trainer is asked without the protocol."""
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
        "overhead_of_a_pass_s": statistics.median(told["pass_s"]) - statistics.median(direct_s),
        "first_token_s": quantiles(told["first_token_s"]),
        "publish_to_first_token_s": quantiles(told["publish_to_first_token_s"]),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    return {name: float(np.quantile(seconds, q)) for name, q in (("p50", 0.5), ("p99", 0.99))}


def passes_beside(base: str, rank: int, num_tokens: int) -> list[float]:
    """Seconds of the client's pass, sent to the trainer's actor from this process."""
    cluster = current_cluster(Settings.from_env().home)
    if cluster is None:
        raise SystemExit("no cluster runs in this LORAY_HOME: `loray up` first")
    os.environ.update(cluster.client_env)
    import ray

    from jobs.trainer import trainer_of

    ray.init(address=cluster.gcs_address, log_to_driver=False, logging_level="ERROR")
    trainer = trainer_of(base)
    tokens = np.arange(100, 100 + num_tokens + 1)
    row = Datum(tokens[:-1], tokens[1:])

    async def measure() -> list[float]:
        spec = LoraSpec(rank=rank).model_dump(mode="json")
        await trainer.create.remote(_MODEL, spec, 0, None)
        found = []
        for seq in range(1, _PASSES + 1):
            began = time.perf_counter()
            await trainer.submit.remote(_MODEL, seq, ForwardBackward(_MODEL, (row,), forward_only=True))
            await trainer.result.remote(_MODEL, seq, 60.0)
            found.append(time.perf_counter() - began)
        await trainer.remove.remote(_MODEL)
        return found

    return asyncio.run(measure())


if __name__ == "__main__":
    main()
