"""Identifiers and paths of Tinker's protocol."""

from __future__ import annotations

import pytest

from loray.errors import RequestError
from loray.schemas.tinker.paths import CheckpointPath, RequestId, check_checkpoint_name, model_id_of, sampler_id_of


def test_ids_are_those_that_the_sdk_computes() -> None:
    assert model_id_of("session-1", 2) == "session-1:train:2"
    assert RequestId.parse("session-1:train:2#3") == ("session-1:train:2", True, 3)
    assert RequestId.parse(f"{sampler_id_of('session-1', 0)}#2000000007") == ("session-1:sample:0", False, 2000000007)
    assert str(RequestId("session-1:train:2", True, 0)) == "session-1:train:2#0"


@pytest.mark.parametrize(
    "text", ["", "x#1", "session-1:train:2", "session-1:train:2#-1", "s:bake:1#1", "s:train:1#1\n"]
)
def test_other_ids_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        RequestId.parse(text)


def test_paths_go_both_ways() -> None:
    path = CheckpointPath.parse("tinker://session-1:train:0/sampler_weights/final")
    assert path == ("session-1:train:0", "sampler", "final")
    assert str(path) == "tinker://session-1:train:0/sampler_weights/final"
    assert CheckpointPath.of("m", "weights", "a").checkpoint_id == "weights/a"


@pytest.mark.parametrize(
    "path", ["", "tinker://m/weights", "tinker://m/weights/../x", "tinker://m/else/x", "s3://m/weights/x"]
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(RequestError, match="tinker://MODEL"):
        CheckpointPath.parse(path)


def test_names_have_no_slash() -> None:
    with pytest.raises(RequestError):
        check_checkpoint_name("../x")
