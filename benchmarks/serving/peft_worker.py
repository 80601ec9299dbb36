"""transformers + PEFT in a separate process, with mixed adapters in a batch. Runs in any Python that has both.

The file imports nothing of this project. It reads lines of JSON and answers each with one. The first line is
{"model": FOLDER, "adapters": [FOLDER, ...], "autocast_adapter_dtype": BOOL}. Each further line is a pass:
{"requests": [[at, adapter, ids, max_tokens, ...], ...], "at_once": N or null}.

PEFT has no continuous batching: requests run in order, N at a time, and each batch runs until its longest request is
done. Prompts are padded on the left.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


class Session:
    def __init__(self, model: str, adapters: list[str], autocast_adapter_dtype: bool) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        if adapters:
            from peft import PeftModel

            dtype = {"autocast_adapter_dtype": autocast_adapter_dtype}
            self._model = PeftModel.from_pretrained(self._model, adapters[0], adapter_name="a0", **dtype)
            for i, folder in enumerate(adapters[1:], 1):
                self._model.load_adapter(folder, adapter_name=f"a{i}", **dtype)
        self._model.eval()
        self._has_adapters = bool(adapters)

    def run(self, requests: list[Any], at_once: int | None) -> dict[str, Any]:
        requests = [request[:4] for request in requests]
        began = time.perf_counter()
        answers: list[dict[str, Any]] = []
        size, free_at = at_once or len(requests), 0.0
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            time.sleep(max(0.0, max(at for at, *_ in batch) - (time.perf_counter() - began)))
            ids, times = self._generate(batch, began)
            for (at, _, _, n), row in zip(batch, ids, strict=True):
                answers.append({"at": at if at_once is None else free_at, "times": times[:n], "ids": row[:n]})
            free_at = times[-1]
        return {"answers": answers, "work": None}

    def _generate(self, batch: list[Any], began: float) -> tuple[list[list[int]], list[float]]:
        torch = self._torch
        width, longest = max(len(ids) for _, _, ids, _ in batch), max(n for *_, n in batch)
        ids = torch.tensor([[0] * (width - len(p)) + p for _, _, p, _ in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for _, _, p, _ in batch])
        times: list[float] = []

        def note(input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter() - began)
            return torch.zeros(len(input_ids), dtype=torch.bool)

        options: dict[str, Any] = {"max_new_tokens": longest, "min_new_tokens": longest, "do_sample": False}
        options["stopping_criteria"] = [note]
        if self._has_adapters:
            options["adapter_names"] = ["__base__" if a is None else f"a{a}" for _, a, _, _ in batch]
        with torch.inference_mode():
            out = self._model.generate(input_ids=ids, attention_mask=mask, **options)
        assert out.shape[1] == width + longest == width + len(times)
        return out[:, width:].tolist(), times


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    session = Session(**json.loads(sys.stdin.readline()))
    out.write(json.dumps({"start_s": time.perf_counter() - began}) + "\n")
    out.flush()
    for line in sys.stdin:
        out.write(json.dumps(session.run(**json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
