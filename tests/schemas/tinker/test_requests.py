"""Requests of Tinker's protocol, those that are wrong too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.errors import RequestError, UnsupportedParameter
from loray.schemas.tinker import requests
from loray.schemas.tinker.proto import ForwardBackwardRequest
from loray.schemas.tinker.requests import read_forward_backward
from tests.fixtures.tinker import pass_body

MODEL = "session-1:train:0"
ROW = {"tokens": [1, 2, 3], "target_tokens": [2, 3, 4]}
OF_POLICY = ROW | {"logprobs": [-1.0, -1.0, -1.0], "advantages": [1.0, 0.0, -1.0]}


def sample(**fields: Any) -> requests.SampleRequest:
    given = {
        "sampling_session_id": "session-1:sample:0",
        "seq_id": 0,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]},
    }
    return requests.SampleRequest.read(json.dumps(given | fields).encode())


def test_an_unknown_field_of_a_body_is_named() -> None:
    with pytest.raises(RequestError, match=r"lora_config\.dora: this server does not know") as e:
        requests.CreateModelRequest.read(
            b'{"session_id": "s", "model_seq_id": 0, "base_model": "b", "lora_config": {"rank": 8, "dora": true}}'
        )
    assert e.value.param == "lora_config.dora"


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        (requests.CreateModelRequest, {"optimizer_config": {"type": "dimuon"}}, "dimuon"),
        (requests.CreateModelRequest, {"lora_config": {"rank": 257}}, "lora_config.rank"),
        (requests.LoadWeightsRequest, {"path": "x", "optimizer": True, "model_id": "m"}, "model_id and seq_id"),
        (
            requests.LoadWeightsRequest,
            {"path": "x", "optimizer": True, "model_id": "m", "seq_id": 1, "session_id": "s", "model_seq_id": 0},
            "either",
        ),
        (requests.OptimStepRequest, {"model_id": "m", "seq_id": 0, "adam_params": {}}, "seq_id"),
        (requests.OptimStepRequest, {"model_id": "m", "seq_id": 1, "adam_params": {"eps": "NaN"}}, "eps"),
        (requests.SaveWeightsForSamplerRequest, {"model_id": "m", "seq_id": 1}, "either path or"),
        (requests.TtlRequest, {"ttl_seconds": 60}, "ttl_seconds"),
        (requests.SessionRequest, {}, "session_id"),
    ],
)
def test_wrong_bodies_say_what_is_wrong(kind: type[requests.TinkerRequest], body: Mapping[str, Any], said: str) -> None:
    known = {"session_id": "s", "model_seq_id": 0, "base_model": "b"} if kind is requests.CreateModelRequest else {}
    with pytest.raises(RequestError, match=said):
        kind.read(json.dumps({**known, **body}).encode())


def test_only_the_head_is_refused() -> None:
    with pytest.raises(UnsupportedParameter, match="head is frozen"):
        _ = requests.LoraConfig(rank=8, train_attn=False, train_mlp=False).target_modules
    assert requests.LoraConfig(rank=8, train_mlp=False).target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")


def test_stops() -> None:
    def params(stop: Any) -> tuple[Any, ...]:
        found = sample(sampling_params={"stop": stop, "max_tokens": 4}).params(64)
        return found.ignore_eos, found.stop, found.stop_token_ids

    assert params(None) == (False, (), ())
    assert params([]) == (True, (), ())
    assert params([7, 8]) == (False, (), (7, 8))
    assert params("\n\nUser:") == (False, ("\n\nUser:",), ())
    assert params(["a", "b"]) == (False, ("a", "b"), ())


def test_what_is_left_of_the_context_is_the_most_tokens() -> None:
    assert sample().params(64).max_tokens == 61
    assert sample().params(64).prompt_logprobs is None
    assert sample(topk_prompt_logprobs=2).params(64).prompt_logprobs == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_alt_tokens_k": 2},
        {"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}},
        {"prompt_logprobs_last_n": 2},
        {"prompt_logprobs": True, "prompt_logprobs_last_n": 3},
        {"prompt": {"chunks": []}},
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        {"num_samples": 129},
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"stop": [""]}},
        {"seq_id": -1},
    ],
)
def test_samples_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        sample(**fields).params(64)


def test_targets_of_one_column_are_flat() -> None:
    asked = read_forward_backward(pass_body(MODEL, 1, ROW | {"target_tokens": [[2], [3], [4]]}))
    np.testing.assert_array_equal(asked.datums[0].target_ids, [2, 3, 4])


def test_weights_of_any_sign_are_taken() -> None:
    asked = read_forward_backward(pass_body(MODEL, 1, ROW | {"weights": [0.0, -2.0, 1.0]}, forward_only=True))
    assert asked.forward_only
    np.testing.assert_array_equal(asked.datums[0].weights, np.array([0, -2, 1], np.float32))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"\xff\xff", "no ForwardBackwardRequest"),
        (pass_body(MODEL, 0, ROW), "seq_id"),
        (pass_body(MODEL, 1), "datums"),
        (pass_body(MODEL, 1, {"tokens": [], "target_tokens": []}), "no tokens"),
        (pass_body(MODEL, 1, {"tokens": [1]}), "needs target_tokens"),
        (pass_body(MODEL, 1, ROW | {"target_tokens": [1, 2]}), "2 values, and model_input has 3"),
        (pass_body(MODEL, 1, ROW | {"target_tokens": [1.0, 2.0, 3.0]}), "int64"),
        (pass_body(MODEL, 1, ROW | {"target_tokens": [[1, 2], [1, 2], [1, 2]]}), "2 columns"),
        (pass_body(MODEL, 1, ROW | {"weights": [1.0, float("nan"), 1.0]}), "not finite"),
        (pass_body(MODEL, 1, ROW | {"mask": [1.0, 1.0, 1.0]}), "cross_entropy has no mask"),
        (pass_body(MODEL, 1, ROW, loss="importance_sampling"), "advantages, logprobs"),
        (pass_body(MODEL, 1, ROW, loss="stable_reinforce"), "ppo, cispo, gspo"),
        (pass_body(MODEL, 1, ROW, loss="custom"), "use one of"),
        (pass_body(MODEL, 1, OF_POLICY, loss="dro"), "beta"),
        (pass_body(MODEL, 1, OF_POLICY, loss="ppo", config={"kl_coeff": 1.0}), "kl_coeff"),
        (pass_body(MODEL, 1, OF_POLICY, loss="ppo", config={"clip_low_threshold": float("inf")}), "a number"),
    ],
)
def test_passes_that_are_refused(raw: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        read_forward_backward(raw)


def test_images_are_refused() -> None:
    message = ForwardBackwardRequest(model_id=MODEL, seq_id=1, loss_fn="cross_entropy")
    message.data.add().model_input.add().image.SetInParent()
    with pytest.raises(UnsupportedParameter, match="an image"):
        read_forward_backward(message.SerializeToString())


def test_ids_and_lengths_are_checked_by_the_base() -> None:
    asked = read_forward_backward(pass_body(MODEL, 1, ROW))
    asked.check(5, 3)
    with pytest.raises(RequestError, match="outside"):
        asked.check(4, 3)
    with pytest.raises(RequestError, match="the context has 2"):
        asked.check(5, 2)


GOOD = pass_body(MODEL, 1, ROW | {"weights": [1.0, 1.0, 1.0]}, OF_POLICY, loss="cross_entropy")


@given(cut=st.integers(0, len(GOOD)), at=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_torn_bodies_are_request_errors_or_requests(cut: int, at: int, byte: int) -> None:
    changed = bytearray(GOOD)
    changed[at] = byte
    for raw in (GOOD[:cut], bytes(changed), bytes(changed[:cut])):
        try:
            asked = read_forward_backward(raw)
            asked.check(100, 100)
        except RequestError:
            continue
        assert asked.datums


@given(
    dtype=st.integers(-1, 6),
    raw=st.binary(max_size=40),
    shape=st.lists(st.integers(-2, 1 << 40), max_size=3),
    sparse=st.booleans(),
    rows=st.lists(st.integers(-2, 9), max_size=5),
    columns=st.lists(st.integers(-2, 9), max_size=5),
)
def test_any_tensor_is_a_request_error_or_numbers(
    dtype: int, raw: bytes, shape: list[int], sparse: bool, rows: list[int], columns: list[int]
) -> None:
    message = ForwardBackwardRequest(model_id=MODEL, seq_id=1, loss_fn="cross_entropy")
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.array([1, 2], "<i4").tobytes()
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.dtype = dtype
    tensor.shape.extend(shape)
    if sparse:
        tensor.sparse_csr.values = raw
        tensor.sparse_csr.crow_indices = np.array(rows, "<i8").tobytes()
        tensor.sparse_csr.col_indices = np.array(columns, "<i8").tobytes()
    else:
        tensor.dense = raw
    try:
        asked = read_forward_backward(message.SerializeToString())
    except RequestError:
        return
    assert asked.datums[0].target_ids.shape == (2,)
