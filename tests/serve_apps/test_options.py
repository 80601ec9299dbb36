"""Options of the command over a file's, as one spec of a fleet."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.errors import SpecError
from serve_apps.options import read_spec


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("base: mine\nport: 9000\npool_bytes: 1MiB\n")
    (spec,) = read_spec(file, {"port": 9001, "pool_bytes": "2MiB"}).bases
    assert (spec.base, spec.port, spec.pool_bytes) == ("mine", 9001, 2 << 20)
    file.write_text("pool: 1\n")
    with pytest.raises(SpecError, match=r"pool: .*known fields: .*pool_bytes"):
        read_spec(file, {})


def test_options_of_one_base_are_refused_beside_several(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("port: 9000\nbases: [{base: a}, {base: b, max_num_seqs: 3}]\n")
    fleet = read_spec(file, {"port": 9001, "num_gateways": 2, "base": None})
    assert (fleet.names, fleet.port, fleet.num_gateways) == (("a", "b"), 9001, 2)
    assert [spec.max_num_seqs for spec in fleet.bases] == [32, 3]
    with pytest.raises(SpecError, match="leave out --max-replicas, --pool-bytes"):
        read_spec(file, {"pool_bytes": "1MiB", "max_replicas": 2})
    file.write_text("bases: [{base: a}, {base: a}]\n")
    with pytest.raises(SpecError, match="the same base twice: a"):
        read_spec(file, {})


def test_bounds_make_the_number_of_replicas_follow_demand(tmp_path: Path) -> None:
    assert read_spec(None, {"num_replicas": 2}).bases[0].autoscaling is None
    (spec,) = read_spec(None, {"max_replicas": 3}).bases
    assert (spec.min_replicas, spec.max_replicas, spec.num_replicas) == (1, 3, 1)
    file = tmp_path / "spec.yaml"
    file.write_text("autoscaling: {min_replicas: 2, max_replicas: 6, window_s: 30}\n")
    scaling = read_spec(file, {"max_replicas": 3}).bases[0].autoscaling
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.window_s) == (2, 3, 30)
    with pytest.raises(SpecError, match="max_replicas must be at least min_replicas"):
        read_spec(None, {"min_replicas": 3, "max_replicas": 2})


def test_fields_of_the_file_count_as_set(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("port: 9000\n")
    assert read_spec(file, {"base": "tiny"}).fields_set == {"port"}
    assert read_spec(None, {"base": "tiny"}).fields_set == set()
