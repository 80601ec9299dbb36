"""The client's part of `benchmarks.serving.tinker`, in an environment with Tinker's SDK and nothing of loray.

python tinker_client.py URL BASE STEPS

It prints a line before each of the single passes, and waits for one: the same pass without the protocol is timed then.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import tinker
from tinker import types

RANKS = (8, 8, 16, 16, 32, 32, 64, 64)
NUM_TOKENS = 32
PASSES = 100
PUBLISHES = 20
RATE = 1e-4
Turn = AbstractContextManager[Any]


def now(value: Any) -> Any:
    return value.result() if hasattr(value, "result") else value


def datum(number: int) -> types.Datum:
    """32 tokens, other ones for each client."""
    tokens = [(37 * (number + 1) * (i + 3)) % 40_000 + 100 for i in range(NUM_TOKENS + 1)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * NUM_TOKENS},
    )


def begin(service: Any, base: str, number: int) -> Any:
    return now(service.create_lora_training_client(base_model=base, rank=RANKS[number], seed=number))


def steps(client: Any, number: int, count: int, turn: Turn) -> tuple[list[float], list[float]]:
    """Losses, and seconds of each step, which begins in its turn."""
    losses, seconds = [], []
    for _ in range(count):
        began = time.perf_counter()
        with turn:
            passed = client.forward_backward([datum(number)], "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=RATE)).result()
            losses.append(float(passed.result().metrics["loss:sum"]))
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def together(service: Any, base: str, count: int, turn: Turn) -> dict[str, Any]:
    """All clients at once, each in a loop of its own."""
    clients = [begin(service, base, number) for number in range(len(RANKS))]
    for number, client in enumerate(clients):
        steps(client, number, 1, nullcontext())
    began = time.perf_counter()
    with ThreadPoolExecutor(len(RANKS)) as pool:
        found = list(pool.map(lambda pair: steps(pair[1], pair[0], count, turn), enumerate(clients)))
    whole = time.perf_counter() - began
    rate = len(RANKS) * count / whole
    return {"losses": [losses for losses, _ in found], "seconds": [s for _, s in found], "steps_per_s": rate}


def timed(what: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        what()
        found.append(time.perf_counter() - began)
    return found


def main(url: str, base: str, count: str) -> None:
    told: dict[str, Any] = {"sdk": tinker.__version__, "ranks": RANKS, "num_tokens": NUM_TOKENS}
    for name, turn in (("mixed", nullcontext()), ("one at a time", Lock())):
        service = tinker.ServiceClient(base_url=url)
        told[name] = together(service, base, int(count), turn)
        if hasattr(service, "close"):
            service.close("success").result()
    service = tinker.ServiceClient(base_url=url)
    alone = begin(service, base, 2)
    told["alone"] = steps(alone, 2, int(count) + 1, nullcontext())[0]  # with the first step that is not counted
    told["pass_s"] = []
    for _ in range(PASSES):
        sys.stdout.write("\n")
        sys.stdout.flush()
        sys.stdin.readline()
        told["pass_s"] += timed(lambda: alone.forward([datum(2)], "cross_entropy").result(), 1)
    prompt, one = types.ModelInput.from_ints([504, 2365, 6354]), types.SamplingParams(max_tokens=1)

    def sample(sampler: Any) -> None:
        sampler.sample(prompt=prompt, num_samples=1, sampling_params=one).result()

    resident = now(alone.save_weights_and_get_sampling_client())
    told["first_token_s"] = timed(lambda: sample(resident), PUBLISHES)
    publishes = []
    for _ in range(PUBLISHES):
        steps(alone, 2, 1, nullcontext())
        publishes += timed(lambda: sample(now(alone.save_weights_and_get_sampling_client())), 1)
    told["publish_to_first_token_s"] = publishes
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
