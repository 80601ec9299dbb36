"""How long OpenMP's threads spin, as libgomp read it when torch was loaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

from loray import SPIN_COUNT
from loray.local.cluster import inherited


@pytest.mark.parametrize(
    ("given", "found"), [({}, 10000), ({"GOMP_SPINCOUNT": "77"}, 77), ({"OMP_WAIT_POLICY": "passive"}, 0)]
)
def test_a_user_s_setting_counts(given: Mapping[str, str], found: int) -> None:
    own = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = own | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    run = [sys.executable, "-c", "from loray.engine import engine"]
    shown = subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch has another OpenMP here")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", shown) == [str(found)]


def test_engines_of_a_local_cluster_keep_their_processors() -> None:
    assert inherited({"GOMP_SPINCOUNT": SPIN_COUNT})["GOMP_SPINCOUNT"] == "300000"
    assert inherited({"GOMP_SPINCOUNT": "77"})["GOMP_SPINCOUNT"] == "77"
    assert "GOMP_SPINCOUNT" not in inherited({"OMP_WAIT_POLICY": "passive"})
