"""The shipped recipes of LongLoRA's paper, dry: on documents as long as RedPajama's their steps are the paper's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loray.bases.presets import preset
from loray.errors import SpecError
from loray.planning.devices import PRESETS
from loray.planning.plan import make_plan
from loray.planning.run import shape_of
from loray.recipes.load import load_recipe
from loray.recipes.resolve import check_row_lengths, resolve
from loray.spec import TrainSpec
from loray.train.data.batches import BatchStream, TokenizedRows
from loray.train.data.corpus import ShardTokens
from loray.train.data.rows import StreamRows, join

RECIPES = {"7b_32k": 32768, "7b_100k": 102400, "13b_64k": 65536, "70b_32k": 32768}
ROWS_A_STEP, STEPS = 64, 20  # the paper's rows; a fiftieth of its steps, so that the corpus fits
BOS, EOS = 1, 2


class Buffer(ShardTokens):
    """Token ids in memory."""

    def __init__(self, ids: NDArray[np.int32]) -> None:
        self._ids = ids

    def ids(self, start: int, stop: int) -> NDArray[np.int32]:
        return self._ids[start:stop]


def corpus(num_tokens: int) -> TokenizedRows:
    """Web documents: half of them below 600 tokens, 1,100 on average, a few as long as books. Row 0 is BOS.

    Their tokens overlap in one buffer, each document ending at an EOS.
    """
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(np.log(600), 1.1, num_tokens // 1000)).astype(np.int64).clip(5, 200_000)
    buffer = rng.integers(3, 32000, lengths.max() + 1, np.int32)
    buffer[0], buffer[-1] = BOS, EOS
    starts = np.concatenate([[0], len(buffer) - lengths])
    return TokenizedRows(buffer, np.ones(len(buffer), np.bool_), starts, np.concatenate([[1], lengths]))


def joined(name: str) -> tuple[TrainSpec, StreamRows, TokenizedRows]:
    spec, n = load_recipe(f"longlora_llama2_{name}").spec, RECIPES[name]
    documents = corpus((STEPS + 2) * ROWS_A_STEP * n)
    begins, lengths = documents.starts[1:], documents.lengths[1:]
    rows, _ = join(Buffer(documents.ids_N), [BOS], begins, lengths, [np.arange(len(begins))], n)
    return spec, rows, documents


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_is_the_papers(name: str) -> None:
    n = RECIPES[name]
    spec, rows, documents = joined(name)
    model = preset(spec.base)
    assert model is not None
    resolved = resolve(spec, model)
    assert (resolved.row_length, resolved.context, resolved.group_size) == (n, n, n // 4)
    assert spec.max_steps == 1000
    assert spec.batch.order == "concat"
    assert np.median(documents.lengths) < 700
    check_row_lengths(spec, float(np.median(rows.lengths)), n, are_texts=True)
    assert (rows.lengths[:-1] == n).all()
    rows = rows.select(np.arange(len(rows) - 1))  # the last one, which is shorter, may be drawn in any step

    data_size = spec.num_workers // spec.parallel.sequence
    streams = [
        BatchStream(
            rows,
            spec.batch,
            max_length=n,
            seed=spec.seed,
            per_step=spec.micro_batches_per_step,
            rank=rank,
            size=data_size,
        )
        for rank in range(data_size)
    ]
    assert streams[0].num_steps(1) >= STEPS
    step = [batch for stream in streams for batch in stream.next_step()]
    assert sum(batch.num_tokens for batch in step) == ROWS_A_STEP * n
    assert sum(batch.num_targets for batch in step) == ROWS_A_STEP * (n - 1)
    for batch in step:
        assert batch.input_ids_BT.shape == (1, n)
        assert batch.position_ids_BT is None  # 0 to n − 1, and one document
        assert batch.document_ids_BT is None
    assert len({batch.input_ids_BT.numpy().tobytes() for batch in step}) == ROWS_A_STEP


def test_rows_are_the_joined_documents() -> None:
    _, rows, documents = joined("7b_32k")
    first = torch.cat([torch.from_numpy(documents.row(i)[0]) for i in range(400)])[: 3 * 32768]
    found = torch.cat([torch.from_numpy(rows.row(i)[0]) for i in range(3)])
    assert torch.equal(found, first)
    assert (found[0], int((found == EOS).sum()) > 40) == (BOS, True)


@pytest.mark.parametrize("order", ["shuffled", "packed"])
def test_one_document_a_row_is_refused(order: str) -> None:
    spec, _, documents = joined("7b_32k")
    apart = spec.model_copy(update={"batch": spec.batch.model_copy(update={"order": order})})
    with pytest.raises(SpecError, match=r"tokens or fewer, of 32,768 .* set batch\.order: concat"):
        check_row_lengths(apart, float(np.median(documents.lengths)), 32768, are_texts=True)


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_is_of_the_same_step_and_fits(name: str) -> None:
    spec = load_recipe(f"longlora_llama2_{name}").spec
    model = preset(spec.base)
    assert model is not None
    plan = make_plan(shape_of(spec, model), PRESETS["a100-80gb"])
    assert plan.problems == ()
    assert plan.run.tokens_per_step == ROWS_A_STEP * RECIPES[name]
    assert plan.memory.peak_bytes <= plan.device.usable_bytes
    assert plan.host is not None
    assert plan.host.num_workers == 8
    assert plan.host.usable_bytes is not None
    assert plan.host.peak_bytes <= plan.host.usable_bytes
