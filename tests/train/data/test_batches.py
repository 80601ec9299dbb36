"""Plans: every document once, within the budget, a function of (seed, epoch), resumable, shared out among ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import SpecError
from loray.spec import BatchSpec
from loray.train.data import batches as module
from loray.train.data.batches import (
    IGNORED,
    BatchStream,
    Cursor,
    LongPlan,
    MicroBatch,
    SourceShare,
    TrainBatch,
    collate,
    first_fit,
    pack_rows,
    plan_epoch,
)
from tests.fixtures.training_data import make_rows

MAX_LENGTH = 64
ORDERS = ["shuffled", "length_grouped", "packed", "concat"]
lengths_ = st.lists(st.integers(2, MAX_LENGTH), min_size=1, max_size=60)


def plan(lengths: list[int], seed: int = 0, epoch: int = 0, **spec: Any) -> list[MicroBatch]:
    return list(plan_epoch(lengths, BatchSpec(**spec), max_length=MAX_LENGTH, seed=seed, epoch=epoch))


def stream(
    lengths: list[int], cursor: Cursor | None = None, rank: int = 0, size: int = 1, per_step: int = 1, **spec: Any
) -> BatchStream:
    return BatchStream(
        make_rows(lengths),
        BatchSpec(**spec),
        max_length=MAX_LENGTH,
        seed=3,
        cursor=cursor or Cursor(),
        per_step=per_step,
        rank=rank,
        size=size,
    )


@pytest.mark.parametrize("order", ORDERS)
@given(lengths=lengths_, rows=st.integers(1, 7), seed=st.integers(0, 9))
def test_each_document_once_and_at_most_so_many_rows(order: str, lengths: list[int], rows: int, seed: int) -> None:
    batches = plan(lengths, seed, rows=rows, order=order)
    assert sorted(i for b in batches for row in b for i in row) == list(range(len(lengths)))
    assert all(1 <= len(b) <= rows for b in batches)
    assert batches == plan(lengths, seed, rows=rows, order=order)


@pytest.mark.parametrize("order", ORDERS)
@given(lengths=lengths_, tokens=st.integers(MAX_LENGTH, 300))
def test_the_token_budget_counts_padding(order: str, lengths: list[int], tokens: int) -> None:
    for batch in plan(lengths, tokens=tokens, order=order):
        widths = [sum(lengths[i] for i in row) for row in batch]
        assert max(widths) * len(batch) <= tokens


def test_epochs_and_seeds_differ() -> None:
    lengths = list(range(2, 40))
    plans = [plan(lengths, seed, epoch, rows=4) for seed in range(2) for epoch in range(2)]
    assert all(a != b for i, a in enumerate(plans) for b in plans[:i])


def test_length_grouping_wastes_less() -> None:
    lengths = np.random.default_rng(0).integers(2, MAX_LENGTH, 400).tolist()

    def padded(order: str) -> int:
        return sum(len(b) * max(lengths[r[0]] for r in b) for b in plan(lengths, rows=8, order=order))

    assert padded("length_grouped") < 0.75 * padded("shuffled")


@given(lengths=lengths_)
def test_first_fit_is_first_fit(lengths: list[int]) -> None:
    rows: list[list[int]] = []
    for i, n in enumerate(lengths):
        for row in rows:
            if sum(lengths[j] for j in row) + n <= MAX_LENGTH:
                row.append(i)
                break
        else:
            rows.append([i])
    found = first_fit(np.array(lengths), MAX_LENGTH)
    assert [np.flatnonzero(found == row).tolist() for row in range(len(rows))] == rows


def test_collate_shifts_labels_and_pads_right() -> None:
    rows = pack_rows([([5, 6, 7], [False, True, True]), ([8, 9, 10, 11], [False, False, False, True])])
    batch = collate(rows, ((0,), (1,)), packed=False)
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.labels_BT.tolist() == [[6, 7, IGNORED, IGNORED], [IGNORED, IGNORED, 11, IGNORED]]
    assert batch.document_ids_BT is not None
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, -1], [0, 0, 0, 0]]
    assert batch.model_inputs(torch.device("cpu"))["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.position_ids_BT is None
    assert (batch.num_tokens, batch.num_targets) == (7, 3)
    equal = collate(make_rows([4, 4]), ((0,), (1,)), packed=False)
    assert list(equal.model_inputs(torch.device("cpu"))) == ["input_ids"]  # what is not there is left out


def test_packed_documents_restart_and_do_not_predict_each_other() -> None:
    rows = make_rows([3, 2, 4])
    batch = collate(rows, ((0, 1), (2,)), packed=True)
    assert batch.position_ids_BT is not None
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert batch.labels_BT.tolist() == [[1, 2, IGNORED, 1001, IGNORED], [2001, 2002, 2003, IGNORED, IGNORED]]
    assert batch.document_ids_BT is not None
    assert batch.document_ids_BT.tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, -1]]
    assert list(batch.model_inputs(torch.device("cpu"))) == ["input_ids", "position_ids"]


def ids(batches: list[TrainBatch]) -> list[list[int]]:
    return [b.input_ids_BT.flatten().tolist() for b in batches]


@pytest.mark.parametrize("order", ORDERS)
def test_a_stream_resumes_from_its_cursor(order: str) -> None:
    lengths = np.random.default_rng(1).integers(2, MAX_LENGTH, 23).tolist()
    spec = {"rows": 2, "per_step": 3, "order": order}
    unbroken = stream(lengths, **spec)
    steps = [(ids(unbroken.next_step()), unbroken.cursor) for _ in range(9)]  # over two epochs and more
    for done in (1, 4, 7):
        resumed = stream(lengths, steps[done - 1][1], **spec)
        assert [(ids(resumed.next_step()), resumed.cursor) for _ in range(9 - done)] == steps[done:]


@pytest.mark.parametrize("order", ORDERS)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), per_step=st.integers(1, 6), steps=st.integers(1, 4))
def test_a_number_of_ranks_that_changes_changes_no_step(
    order: str, sizes: list[int], per_step: int, steps: int
) -> None:
    """Each number of ranks takes up the others' cursor, within an epoch or at its end: every row counts as often."""
    lengths = np.random.default_rng(2).integers(2, MAX_LENGTH, 19).tolist()
    alone = stream(lengths, rows=2, per_step=per_step, order=order)
    cursor = Cursor()
    for size in sizes:
        ranks = [stream(lengths, cursor, r, size, rows=2, per_step=per_step, order=order) for r in range(size)]
        for _ in range(steps):
            shares = [rank.next_step() for rank in ranks]
            assert {len(share) for share in shares} == {-(-per_step // size)}  # some have one that counts for nothing
            every = [batch for round_ in zip(*shares, strict=True) for batch in round_]
            counted = [batch for batch in every if batch.num_targets]
            assert ids(counted) == ids(alone.next_step())
            assert sum(batch.num_tokens for batch in every) == sum(batch.num_tokens for batch in counted)
            assert all(batch.num_targets or bool((batch.labels_BT == IGNORED).all()) for batch in every)
        (cursor,) = {rank.cursor for rank in ranks}
        assert cursor == alone.cursor


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2, 5), (0.5, 2), (0.01, 1)])
def test_steps_of_epochs(epochs: float, steps: int) -> None:
    assert stream([4] * 10, rows=2, per_step=2).num_steps(epochs) == steps  # 5 micro-batches an epoch


@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=60))
def test_packed_rows_fit_a_budget_below_the_longest_row_allowed(lengths: list[int]) -> None:
    batches = plan(lengths, tokens=20, order="packed")
    assert sorted(i for b in batches for row in b for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 20 for b in batches for row in b)
    with pytest.raises(SpecError, match=r"batch\.tokens is 20, less than a row of 21 tokens"):
        plan([*lengths, 21], tokens=20, order="packed")
    with pytest.raises(SpecError, match=r"batch\.tokens is 10, less than a row of 20 tokens"):
        plan([20], tokens=10)


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of more than twelve rows are long."""
    monkeypatch.setattr(module, "_STRIP", 4)
    monkeypatch.setattr(module, "_STRIPS", 3)


def long_plan(lengths: list[int], epoch: int = 0, **options: Any) -> LongPlan:
    fields = {name: options.pop(name) for name in ("rows", "tokens", "order") if name in options}
    options = {"max_length": MAX_LENGTH, "seed": 3, "epoch": epoch} | options
    return LongPlan(make_rows(lengths), BatchSpec.model_validate(fields), **options)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("size", [{"rows": 3}, {"tokens": 2 * MAX_LENGTH}])
@pytest.mark.parametrize("order", ORDERS)
def test_a_long_epoch_has_each_document_once(order: str, size: dict[str, int]) -> None:
    lengths = [2 + 7 * i % 60 for i in range(101)]
    batches = list(long_plan(lengths, order=order, **size))
    assert sorted(i for b in batches for row in b for i in row) == list(range(101))
    assert batches == list(long_plan(lengths, order=order, **size)) != list(long_plan(lengths, 1, order=order, **size))
    if "rows" in size:
        assert max(map(len, batches)) == 3
    if order == "packed":
        assert all(sum(lengths[i] for i in row) <= MAX_LENGTH for b in batches for row in b)
        assert sum(len(b) for b in batches) < 101


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("order", ORDERS)
def test_a_long_epoch_is_resumed_and_shared_out(order: str) -> None:
    lengths = [2 + 7 * i % 60 for i in range(101)]
    alone = [flat(b) for s in [stream(lengths, rows=2, order=order)] for _ in range(60) for b in s.next_step()]
    resumed = stream(lengths, Cursor(0, 7), rows=2, order=order)
    assert [flat(b) for _ in range(53) for b in resumed.next_step()] == alone[7:]
    ranks = [stream(lengths, rank=r, size=2, per_step=2, rows=2, order=order) for r in range(2)]
    shared = [[flat(b) for b in s.next_step()] for _ in range(30) for s in ranks]
    assert [b for (b,) in shared] == alone
    assert ranks[0].num_steps(1.0) == -(-len(long_plan(lengths, rows=2, order=order)) // 2)


def flat(batch: TrainBatch) -> list[list[int]]:
    return batch.input_ids_BT.tolist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("short_blocks")
def test_ranks_count_a_long_epoch_together() -> None:
    lengths, sums = [2 + 7 * i % 60 for i in range(101)], list[list[int]]()

    def share_out(function: Any, num: int) -> list[int]:
        sums.append([function(k) for k in range(num)])
        return sums[-1]

    plan = long_plan(lengths, rows=2, order="packed", share_out=share_out)
    assert len(plan) == sum(*sums)
    with pytest.raises(IndexError):
        plan[len(plan)]


@pytest.mark.usefixtures("short_blocks")
def test_pairs_and_shares_of_a_long_epoch() -> None:
    lengths = [2 + 7 * i % 60 for i in range(80)]
    pairs = list(long_plan(lengths, rows=4, order="length_grouped", paired=True))
    assert sorted(i for b in pairs for (i,) in b) == list(range(40))
    shares = [SourceShare(40, 2.0), SourceShare(40, 0.5)]
    drawn = [i for b in long_plan(lengths, rows=4, order="shuffled", shares=shares) for (i,) in b]
    assert sorted(i for i in drawn if i < 40) == sorted(2 * list(range(40)))
    assert len({i for i in drawn if i >= 40}) == len(drawn) - 80 == 20
