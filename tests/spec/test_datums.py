"""Data, losses and optimizer steps: what is refused, and the bytes in which they are kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import IntegrityError, RequestError, SpecError
from loray.spec.datums import (
    FIELDS,
    AdamParams,
    Datum,
    ForwardBackward,
    LoadState,
    LossOutput,
    OptimStep,
    Publish,
    SaveState,
    TokenLoss,
    op_from_bytes,
    op_to_bytes,
    output_from_bytes,
    output_to_bytes,
)


def test_a_datum_converts_what_it_is_given() -> None:
    datum = Datum([1, 2], [2, 3], weights=[0, 1])
    assert (datum.token_ids.dtype, datum.target_ids.dtype, datum.weights.dtype) == (np.int32, np.int64, np.float32)
    assert len(datum) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [], "target_ids": []},
        {"token_ids": [1, 2], "target_ids": [1]},
        {"token_ids": [[1, 2]], "target_ids": [[1, 2]]},
        {"token_ids": [1], "target_ids": [1], "weights": [1.0, 2.0]},
        {"token_ids": ["a"], "target_ids": [1]},
        {"token_ids": [1 << 40], "target_ids": [1]},
    ],
)
def test_a_datum_of_other_shapes_is_refused(fields: dict) -> None:
    with pytest.raises(RequestError, match="datum"):
        Datum(**fields)


def test_each_loss_has_the_options_that_are_its_own() -> None:
    assert (TokenLoss(type="ppo").clip_low, TokenLoss(type="ppo").clip_high) == (0.8, 1.2)
    assert (TokenLoss(type="cispo").clip_low, TokenLoss(type="cispo").clip_high) == (0.0, 4.0)
    assert TokenLoss(type="ppo", clip_high=1.28).clip_low == 0.8
    assert TokenLoss(type="importance_sampling").ratio_cap is None
    for wrong in (
        {"type": "cross_entropy", "clip_low": 0.1},
        {"type": "dro"},
        {"type": "ppo", "clip_low": 1.5},
        {"type": "ppo", "beta": 0.1},
        {"type": "sapo"},
        {"type": ["ppo"]},
        {"divisor": 0.0},
    ):
        with pytest.raises(SpecError):
            TokenLoss.parse(wrong, source="loss")


def test_a_loss_needs_its_arrays() -> None:
    with pytest.raises(RequestError, match="datum 0 has no logprobs and no advantages, which ppo needs"):
        ForwardBackward("m", (Datum([1], [1]),), TokenLoss(type="ppo"))
    with pytest.raises(RequestError, match="no datum"):
        ForwardBackward("m", ())


@given(
    st.lists(st.tuples(st.integers(1, 5), st.sets(st.sampled_from(FIELDS[2:]))), min_size=1, max_size=4),
    st.booleans(),
)
def test_operations_come_back_from_their_bytes(rows: list[tuple[int, set[str]]], forward_only: bool) -> None:
    datums = tuple(
        Datum(np.arange(n), np.arange(n) + 1, **{name: np.full(n, i + 0.5) for i, name in enumerate(sorted(names))})
        for n, names in rows
    )
    op = ForwardBackward("model", datums, TokenLoss(divisor=3.0), forward_only)
    data = op_to_bytes(op)
    again = op_from_bytes(data)
    assert isinstance(again, ForwardBackward)
    assert op_to_bytes(again) == data
    assert (again.model, again.loss, again.forward_only) == (op.model, op.loss, forward_only)
    for ours, theirs in zip(datums, again.datums, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_steps_and_outputs_come_back_from_their_bytes() -> None:
    step = OptimStep("model", AdamParams(learning_rate=0.1, grad_clip_norm=1.0))
    for op in (step, SaveState("m", "step-10"), LoadState("m", "/folder", True), Publish("m")):
        assert op_from_bytes(op_to_bytes(op)) == op
    output = LossOutput((np.float32([-0.1, np.nan]), np.float32([-2.0])), 1 / 3, {"kl": 0.25})
    again = output_from_bytes(output_to_bytes(output))
    assert (again.loss, again.metrics) == (1 / 3, {"kl": 0.25})
    for ours, theirs in zip(output.logprobs, again.logprobs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_damaged_bytes_are_an_integrity_error() -> None:
    data = op_to_bytes(ForwardBackward("m", (Datum([1, 2], [2, 3]),)))
    for damaged in (b"", b"x", data[:-3], op_to_bytes(OptimStep("m"))[:10]):
        with pytest.raises(IntegrityError):
            op_from_bytes(damaged)
