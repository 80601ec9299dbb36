"""What the SDK's versions have sent, and what they read (`record.py`)."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loray.schemas.tinker import requests
from loray.schemas.tinker.proto import ForwardBackwardRequest, parse
from loray.schemas.tinker.requests import TinkerRequest, read_forward_backward
from loray.schemas.tinker.results import pass_bytes, sample_bytes
from loray.spec import SampledSequence, SampleResult
from loray.spec.datums import LossOutput

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
SESSION = "session-0123456789abcdef"
KINDS: dict[str, type[TinkerRequest]] = {
    "asample": requests.SampleRequest,
    "client/config": requests.ClientConfigRequest,
    "client/dynamic_config": requests.ClientConfigRequest,
    "create_model": requests.CreateModelRequest,
    "create_session": requests.CreateSessionRequest,
    "get_info": requests.ModelRequest,
    "load_weights": requests.LoadWeightsRequest,
    "optim_step": requests.OptimStepRequest,
    "retrieve_future": requests.RequestIdRequest,
    "save_weights": requests.SaveWeightsRequest,
    "save_weights_for_sampler": requests.SaveWeightsForSamplerRequest,
    "weights_info": requests.WeightsInfoRequest,
}


@pytest.fixture(params=RECORDED, ids=lambda path: path.stem)
def recorded(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.param.read_text())
    return found


def body(recorded: dict[str, Any], path: str) -> bytes:
    return base64.b64decode(recorded["sent"][path])


def test_five_versions_are_recorded() -> None:
    assert [path.stem for path in RECORDED] == ["0.25.0", "0.30.4", "0.33.1", "0.36.0", "0.38.0"]


def test_all_json_bodies_are_read(recorded: dict[str, Any]) -> None:
    paths = recorded["sent"].keys() - {"forward_backward"}
    assert paths <= KINDS.keys()
    read = {path: KINDS[path].read(body(recorded, path)) for path in paths}
    assert read["optim_step"].adam_params.eps == 1e-12  # type: ignore[attr-defined]
    assert read["create_model"].lora_config.train_unembed  # type: ignore[attr-defined]
    params = read["asample"].params(64)  # type: ignore[attr-defined]
    assert (params.stop, params.include_stop_str_in_output, params.prompt_logprobs) == (("\n",), True, 0)


def test_a_pass_is_read(recorded: dict[str, Any]) -> None:
    raw = body(recorded, "forward_backward")
    asked = read_forward_backward(raw)
    assert (asked.model_id, asked.seq_id, asked.forward_only) == (f"{SESSION}:train:0", 1, False)
    assert (asked.loss.type, asked.loss.clip_low, asked.loss.clip_high) == ("ppo", 0.0, 1.25)
    first, second = asked.datums
    np.testing.assert_array_equal(first.token_ids, [5, 6, 7])
    np.testing.assert_array_equal(first.target_ids, [6, 7, 8])
    np.testing.assert_array_equal(first.advantages, np.array([1, -1, 0.5], np.float32))
    np.testing.assert_array_equal(second.target_ids, [9])


def test_a_pass_is_written_back_with_the_same_bytes(recorded: dict[str, Any]) -> None:
    raw = body(recorded, "forward_backward")
    message = parse(ForwardBackwardRequest, raw)
    again = parse(ForwardBackwardRequest, message.SerializeToString(deterministic=True))
    assert again == message
    assert len(message.SerializeToString()) == len(raw)  # maps have no order


def test_results_have_the_bytes_that_the_sdk_writes(recorded: dict[str, Any]) -> None:
    logprobs = tuple(np.array(row, np.float32) for row in recorded["read"]["logprobs"])
    output = LossOutput(logprobs, recorded["read"]["metrics"]["loss:sum"], {})
    assert pass_bytes(output) == base64.b64decode(recorded["output"])
    sequence = SampledSequence((7, 8), (-0.25, -0.5), "length", 1)
    assert sample_bytes(SampleResult((sequence,), (-1.0,)), 2, None, 0, 0) == base64.b64decode(recorded["sample"])
    assert recorded["read"]["tokens"] == [7, 8]
