"""A script of the SDK, for every version from 0.25.0 on: trains, saves, goes on, samples. It prints what it has seen.

python loop.py URL BASE
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import tinker
from tinker import types

STEPS = 20
TEXT = [504, 2365, 6354, 16438, 27003, 690, 260, 2365, 6354]


def now(value: Any) -> Any:
    return value.result() if hasattr(value, "result") else value


def main(url: str, base: str) -> None:
    service = tinker.ServiceClient(base_url=url, user_metadata={"loray.priority": "0"})
    metadata = {"loray.name": f"spoken-{tinker.__version__.replace('.', '-')}"}
    client = now(service.create_lora_training_client(base_model=base, rank=8, seed=1, user_metadata=metadata))
    rows = types.ModelInput.from_ints(TEXT[:-1])
    datum = types.Datum(model_input=rows, loss_fn_inputs={"target_tokens": TEXT[1:], "weights": [1.0] * 8})
    losses = []
    for _ in range(STEPS):
        passed = client.forward_backward([datum], "cross_entropy")
        stepped = client.optim_step(types.AdamParams(learning_rate=1e-3))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    saved = client.save_state("half").result().path
    again = now(service.create_training_client_from_state_with_optimizer(saved))
    seen = {"saved": saved, "losses": losses}
    for name, model in (("before", client), ("after", again)):
        output = model.forward([datum], "cross_entropy").result()
        seen[name] = [float(value) for value in output.loss_fn_outputs[0]["logprobs"].data]
    sampler = now(again.save_weights_and_get_sampling_client())
    seen["scored"] = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()[1:]
    sampled = sampler.sample(
        prompt=types.ModelInput.from_ints(TEXT[:4]),
        num_samples=2,
        sampling_params=types.SamplingParams(max_tokens=4, temperature=0.0),
    ).result()
    seen["sampled"] = [int(token) for token in sampled.sequences[0].tokens]
    seen["difference"] = float(np.abs(np.array(seen["after"]) - np.array(seen["scored"])).max())
    seen["published"] = again.save_weights_for_sampler("last").result().path
    weights = now(service.create_sampling_client(model_path=client.save_weights_for_sampler("last").result().path))
    one = types.SamplingParams(max_tokens=1, temperature=0.0)
    prompt = types.ModelInput.from_ints(TEXT[:4])
    seen["versions"] = len(weights.sample(prompt=prompt, num_samples=1, sampling_params=one).result().sequences)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
