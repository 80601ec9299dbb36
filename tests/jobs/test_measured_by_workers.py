"""What workers trained together they measure together, on a real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.bases.registry import add_base
from loray.catalog import Catalog
from tests.fixtures.cluster import RayCluster
from tests.fixtures.runs import long_recipe, run, train_here
from tests.fixtures.tiny import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(480)]

TINY = "tiny-measured"


def test_a_base_that_workers_share_is_measured_by_them(
    ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their figures of the base are those of one process that holds it whole."""
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=ray_cluster.home, name=TINY)
    shared = {"num_workers": 2, "parallel": {"strategy": "fsdp2"}}
    asked = {
        "perplexity": {"stride": 32, "max_windows": 4},
        "retrieval": [{"task": "passkey", "context_lengths": [400], "depths": [0.5], "samples": 1}],
    }
    events = run(
        long_recipe(tmp_path / "shared", base=TINY, name="shared", evaluation=asked, **shared), ray_cluster.settings
    )
    whole = long_recipe(
        tmp_path / "whole", base=TINY, name="whole", evaluation=asked, batch={"rows": 2, "accumulation": 2}
    )
    with monkeypatch.context() as patched:
        patched.setattr("ray.is_initialized", lambda: False)  # so that this process measures
        train_here(whole, ray_cluster.settings, tmp_path)
    assert [e["event"] for e in events[-2:]] == ["measure", "published"]
    assert events[-1]["unmeasured"] is None
    catalog = Catalog(ray_cluster.settings.catalog)
    ours, theirs = (catalog.adapters.version(name, 1).manifest.evaluations for name in ("shared", "whole"))
    assert len(ours) == 3 + 6 + 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.model_copy(update={"value": 0.0}) == other.model_copy(update={"value": 0.0})
        if one.subject != "adapter":
            assert one.value == pytest.approx(other.value, rel=1e-4)
