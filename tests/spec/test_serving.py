"""Serve specs: a deployment of one base, and of several that share fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loray.errors import SpecError
from loray.spec import FleetSpec, ServeSpec
from tests.fixtures.calls import refused

TWO: dict[str, Any] = {
    "port": 9000,
    "num_gateways": 2,
    "max_body_bytes": "2MiB",
    "pool_bytes": "1MiB",
    "autoscaling": {"max_replicas": 4, "window_s": 30},
    "bases": [
        {"base": "small"},
        {"base": "large", "pool_bytes": "4MiB", "tensor_parallel_size": 2, "autoscaling": {"max_replicas": 2}},
    ],
}


def parse(data: Any) -> FleetSpec:
    return FleetSpec.parse(data, source="fleet.yaml")


def test_one_base_is_a_fleet_of_one() -> None:
    given = {"base": "small", "port": 9000, "pool_bytes": "1MiB"}
    fleet = parse(given)
    assert fleet.bases == (ServeSpec.parse(given, source="x"),)
    assert fleet.to_args() == fleet.bases[0].model_dump(mode="json")
    assert (fleet.names, fleet.port, fleet.fields_set) == (("small",), 9000, {"port"})
    assert parse({}).names == ("smollm2",)


@pytest.mark.parametrize(
    ("given", "num_seqs", "num_tokens"),
    [
        ({}, 32, 512),
        ({"device": "cpu"}, 32, 512),
        ({"device": "cuda"}, 256, 8192),
        ({"device": "cuda:1", "max_num_seqs": 64}, 64, 8192),
        ({"device": "cuda", "max_num_batched_tokens": 128}, 128, 128),
        ({"max_num_batched_tokens": 8}, 8, 8),
    ],
)
def test_the_size_of_steps_is_the_devices_unless_it_is_given(
    given: dict[str, Any], num_seqs: int, num_tokens: int
) -> None:
    spec = parse(given).bases[0]
    assert (spec.max_num_seqs, spec.max_num_batched_tokens) == (num_seqs, num_tokens)
    assert parse(spec.model_dump(mode="json")).bases == (spec,)


def test_each_base_has_the_size_of_its_own_device() -> None:
    bases = parse({"bases": [{"base": "small"}, {"base": "large", "device": "cuda"}]}).bases
    assert [spec.max_num_seqs for spec in bases] == [32, 256]


def test_shared_fields_hold_where_a_base_has_none_of_its_own(tmp_path: Path) -> None:
    small, large = parse(TWO).bases
    assert (small.pool_bytes, large.pool_bytes) == (1 << 20, 4 << 20)
    assert (small.tensor_parallel_size, large.tensor_parallel_size) == (1, 2)
    assert small.autoscaling is not None
    assert large.autoscaling is not None
    assert (small.max_replicas, large.max_replicas) == (4, 2)
    assert small.autoscaling.window_s == large.autoscaling.window_s == 30  # sections are merged by field
    off = parse(TWO | {"bases": [{"base": "small", "autoscaling": None}]})
    assert off.bases[0].autoscaling is None


def test_arguments_are_read_back() -> None:
    fleet = parse(TWO)
    args = fleet.to_args()
    assert args.keys() == {"host", "port", "num_gateways", "max_body_bytes", "bases"}
    assert parse(args) == fleet
    moved = fleet.at("0.0.0.0", 9001)
    assert (moved.host, moved.port, moved.num_gateways, moved.names) == ("0.0.0.0", 9001, 2, fleet.names)
    assert parse(moved.to_args()) == moved


def test_replicas_depend_on_their_own_base_alone() -> None:
    before, after = parse(TWO), parse(TWO | {"port": 9002, "num_gateways": 3, "bases": [*TWO["bases"], {"base": "x"}]})
    assert [s.for_replicas for s in before.bases] == [s.for_replicas for s in after.bases[:2]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"bases": []}, "fleet.yaml: `bases` must be a list of at least one"),
        ({"bases": {"base": "a"}}, "must be a list"),
        ({"bases": ["a"]}, "bases.0 must be a mapping with the field `base`"),
        ({"bases": [{"base": "a"}, {"pool_bytes": 1}]}, "bases.1 must be a mapping with the field `base`"),
        ({"bases": [{"base": "a"}, {"base": "b"}, {"base": "a"}]}, "the same base twice: a"),
        ({"base": "a", "bases": [{"base": "b"}]}, "both `base` and `bases`"),
        ({"pool": 1, "bases": [{"base": "a"}]}, r"unknown fields beside `bases`: pool; known fields: .*pool_bytes"),
        ({"bases": [{"base": "a", "pool": 1}]}, r"the base a is not a valid serve spec:\n  pool: .*known fields"),
        ({"bases": [{"base": "a", "port": 1}]}, "the base a has port, which all bases share"),
        ({"bases": [{"base": "a", "max_body_bytes": 1}]}, "the base a has max_body_bytes, which all bases share"),
        ({"bases": [{"base": "a", "max_num_seqs": 0}]}, "the base a is not"),
        ({"base": "a", "pool": 1}, r"fleet.yaml is not a valid serve spec:\n  pool: .*known fields"),
        ([1], r"fleet.yaml is not a valid serve spec:\n  .top level.: must be a mapping"),
    ],
)
def test_a_wrong_fleet_is_refused_with_what_is_wrong(data: Any, words: str) -> None:
    refused(SpecError, words, parse, data)
