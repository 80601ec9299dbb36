"""Tensors of Tinker's messages, both ways."""

from __future__ import annotations

import numpy as np
import pytest

from loray.errors import RequestError
from loray.schemas.tinker.proto import ForwardBackwardOutput, ForwardBackwardRequest, SampleResponse
from loray.schemas.tinker.results import pass_bytes, sample_bytes
from loray.schemas.tinker.tensors import BFLOAT16, FLOAT32, INT64, read_tensor
from loray.spec import SampledSequence, SampleResult
from loray.spec.datums import LossOutput


def tensor() -> object:
    return ForwardBackwardRequest().data.add().loss_fn_inputs["x"]


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    message = tensor()
    message.dtype, message.dense = BFLOAT16, np.array([0x3F80, 0xC000], "<u2").tobytes()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(read_tensor(message, "x"), [1.0, -2.0])


def test_sparse_rows_are_made_dense() -> None:
    message = tensor()
    message.dtype = FLOAT32  # type: ignore[attr-defined]
    message.shape.extend([3, 2])  # type: ignore[attr-defined]
    sparse = message.sparse_csr  # type: ignore[attr-defined]
    sparse.values = np.array([5, 6, 7], "<f4").tobytes()
    sparse.crow_indices = np.array([0, 1, 1, 3], "<i8").tobytes()
    sparse.col_indices = np.array([1, 0, 1], "<i8").tobytes()
    np.testing.assert_array_equal(read_tensor(message, "x"), [[0, 5], [0, 0], [6, 7]])


def test_a_huge_sparse_tensor_is_refused() -> None:
    message = tensor()
    message.dtype = INT64  # type: ignore[attr-defined]
    message.shape.extend([1 << 30, 1 << 30])  # type: ignore[attr-defined]
    message.sparse_csr.values = b""  # type: ignore[attr-defined]
    with pytest.raises(RequestError, match="at most"):
        read_tensor(message, "x")


def test_offsets_of_a_pass_count_bytes() -> None:
    output = LossOutput((np.array([1, 2, 3], np.float32), np.array([4], np.float32)), 2.5, {"clipped": 0.5, "a:max": 1})
    message = ForwardBackwardOutput.FromString(pass_bytes(output))
    record = message.loss_fn_outputs[0]
    assert record.num_datums == 2
    np.testing.assert_array_equal(np.frombuffer(record.fields["logprobs"].offsets, "<i8"), [0, 12, 16])
    assert dict(message.metrics) == {"loss:sum": 2.5, "clipped:mean": 0.5, "a:max": 1.0}


def test_prompts_have_no_logprob_of_their_first_token() -> None:
    top = (((7, -0.5), (8, -1.5)), ((9, -0.25),))
    result = SampleResult((SampledSequence((1,), (-2.0,), "stop", 4, ((),)),), (-1.0, -3.0), top)
    message = SampleResponse.FromString(sample_bytes(result, 3, None, 2, 0))
    np.testing.assert_array_equal(np.frombuffer(message.prompt_logprobs, "<f4"), [np.nan, -1, -3])
    assert (message.sequences[0].stop_reason, message.prompt_cache_hit_tokens) == (0, 4)
    found = message.topk_prompt_logprobs
    assert (found.k, found.length) == (2, 3)
    np.testing.assert_array_equal(np.frombuffer(found.token_ids, "<i4"), [0, 0, 7, 8, 9, 0])
    assert np.frombuffer(found.logprobs, "<f4")[-1] == -99999.0


def test_only_the_last_tokens_of_a_prompt_have_logprobs() -> None:
    result = SampleResult((SampledSequence((1,), (-2.0,), "length"),), (-1.0, -3.0))
    message = SampleResponse.FromString(sample_bytes(result, 3, 1, 0, 0))
    np.testing.assert_array_equal(np.frombuffer(message.prompt_logprobs, "<f4"), [np.nan, np.nan, -3])
