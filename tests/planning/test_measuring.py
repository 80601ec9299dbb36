"""The memory of a worker that measures before publishing, against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loray.bases.presets import preset
from loray.planning.memory import MEASURED_AT_ONCE, measuring_bytes
from loray.planning.plan import advice_for_less, make_plan
from loray.planning.run import RunShape, shape_of
from tests.planning.recipes import A100, bare, long_run, recipe
from tests.planning.test_memory import EMBEDDING, TOTALS, TRAINED

BASE = 2 * TOTALS["Llama-2-7b-hf"]
WIDTH = 3 * 11008 * 2 + (2 * 2 + 4) * 4096  # of a token in one layer: gate, up and their product, and the layer's input
PASSKEY = {"retrieval": [{"context_lengths": [4096, 2048]}]}


def llama(context: int = 32768, **fields: Any) -> RunShape:
    return long_run("Llama-2-7b-hf", context, workers=8, gradient_checkpointing=True, **fields)


def qlora(num_workers: int = 1, **fields: Any) -> RunShape:
    model = preset("Llama-2-70b-hf")
    assert model is not None
    data = {"train": "data.jsonl", "max_length": 1024}
    return shape_of(
        recipe(quantization={}, data=data, num_workers=num_workers, gradient_checkpointing=True, **fields), model
    )


def test_a_whole_base_and_the_longest_pass() -> None:
    logits = 2 * 4 * A100.loss_chunk
    for evaluation, tokens in (({"perplexity": {}}, 32768), (PASSKEY, MEASURED_AT_ONCE)):
        expected = BASE + 2 * TRAINED + tokens * WIDTH + min(logits, 2 * 4 * tokens * 32000)
        assert measuring_bytes(llama(evaluation=evaluation), bare()) == expected
    assert measuring_bytes(llama(), A100) == 0


def test_workers_share_what_they_share_in_training() -> None:
    run = llama(evaluation={"perplexity": {}}, strategy="fsdp2", sequence=4)
    gathered = 2 * (3 * run.base.layer + 2 * EMBEDDING + 4096)
    tokens = 32768 // 4
    passing = tokens * WIDTH + min(2 * 4 * A100.loss_chunk, 2 * 4 * tokens * 32000)
    assert measuring_bytes(run, bare()) == (BASE + 2 * TRAINED) // 8 + gathered + passing


def test_a_quantized_base_that_cannot_be_measured_is_refused_before_it_is_trained() -> None:
    """It is measured as it is served: one worker trains it in 4 bits, and has no room for 16."""
    assert not make_plan(qlora(), A100).is_refused
    plan = make_plan(qlora(evaluation=PASSKEY), A100)
    (problem,) = (p for p in plan.problems if p.severity == "refusal")
    assert (
        "GB a worker to measure base and adapter before publishing (`evaluation`), where a100-80gb" in problem.message
    )
    assert problem.remedy.startswith("num_workers: 2 would take ")
    assert problem.remedy.endswith(", or leave out what is measured")
    assert not make_plan(qlora(2, evaluation=PASSKEY), A100).is_refused
    assert plan.to_dict()["memory"]["measuring_bytes"] == plan.measuring > A100.usable_bytes


@pytest.mark.parametrize("evaluation", [{}, PASSKEY])
def test_advice_after_a_lack_of_memory_counts_measuring(evaluation: dict[str, Any]) -> None:
    assert "would take" in advice_for_less(llama(evaluation=evaluation), A100)
