"""Measured rates are kept in LORAY_HOME, and those of another version are not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.planning.devices import HostRates
from loray.planning.rates import keep_rates, kept_rates

RATES = HostRates(16 << 30, 4e11, 8e10, 9e10, 4e10)


def test_rates_are_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert kept_rates(home) is None
    keep_rates(home, RATES)
    assert kept_rates(home) == RATES
    assert [path.name for path in home.iterdir()] == ["rates.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1, "rates": {}}', '{"version": 2, "rates": {"flops": 1}}']
)
def test_what_is_not_of_this_version_is_not_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    assert kept_rates(tmp_path) is None
