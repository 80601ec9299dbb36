"""Sixty steps, whatever is killed meanwhile. It prints the losses, and the steps that the trainer has done.

python steps.py URL BASE STEPS
"""

from __future__ import annotations

import json
import sys
from typing import Any

import tinker
from tinker import types

TEXT = [504, 2365, 6354, 16438, 27003, 690, 260, 2365, 6354]


def now(value: Any) -> Any:
    return value.result() if hasattr(value, "result") else value


def main(url: str, base: str, count: str) -> None:
    service = tinker.ServiceClient(base_url=url)
    client = now(service.create_lora_training_client(base_model=base, rank=8, seed=1))
    rows = types.ModelInput.from_ints(TEXT[:-1])
    datum = types.Datum(model_input=rows, loss_fn_inputs={"target_tokens": TEXT[1:], "weights": [1.0] * 8})
    losses = []
    for step in range(int(count)):
        passed = client.forward_backward([datum], "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-4)).result()
        losses.append(passed.result().metrics["loss:sum"])
        if step % 10 == 9:
            sampler = now(client.save_weights_and_get_sampling_client())
            params = types.SamplingParams(max_tokens=2, temperature=0.0)
            sampler.sample(prompt=types.ModelInput.from_ints(TEXT[:4]), num_samples=1, sampling_params=params).result()
        print(json.dumps({"step": step + 1}), flush=True)
    print(json.dumps({"model": client.model_id, "losses": losses}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
