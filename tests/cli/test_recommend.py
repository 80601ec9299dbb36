"""The command `loray recommend`."""

from __future__ import annotations

import json

import pytest

from loray.methods import METHODS
from tests.cli.run import Loray

ANSWERS = ("--context-length", 2048, "--num-tasks", 1000)


def test_everything_as_json(loray: Loray) -> None:
    _, out, _ = loray("recommend", *ANSWERS, "--json", "--base", "Meta-Llama-3-8B", "--device", "h100-80gb")
    found = json.loads(out)
    assert (found["base"], found["device"]) == ("Meta-Llama-3-8B", "h100-80gb")
    assert {entry["method"] for entry in found["estimates"]} == set(METHODS)
    assert {"lora", "dora", "vera"} <= {entry["method"] for entry in found["quotes"]}


def test_quality_and_costs(loray: Loray) -> None:
    code, out, err = loray("recommend", "--context-length", 32768, "--num-tasks", 5, "--base", "Llama-2-7b-hf")
    assert (code, err) == (0, "")
    assert out.index("Quality, as measured") < out.index("Estimates for Llama-2-7b-hf on a100-80gb")
    assert "VeRA r256 on q, v" in out
    assert "lora: data.max_length is 32768" in out
    assert "RoPE must be scaled" in out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((*ANSWERS, "--base", "gpt-9"), 1, "no base model 'gpt-9' on this machine"),
        ((*ANSWERS, "--device", "abacus"), 1, "no device 'abacus'"),
        (("--num-tasks", 5), 2, "--context-length"),
        (("--context-length", 0, "--num-tasks", 5), 2, "0 is not in the range"),
    ],
)
def test_bad_input(loray: Loray, args: tuple[object, ...], code: int, message: str) -> None:
    found, _, err = loray("recommend", *args)
    assert found == code
    assert message in err
