"""Which base `loray doctor` examines."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.cli.doctor import _specs
from loray.errors import SpecError


def test_of_several_bases_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("pool_bytes: 1MiB\nbases: [{base: a}, {base: b, pool_bytes: 2MiB}]\n")
    found, others = _specs(file, "b", 9000)
    assert (found.base, found.pool_bytes, found.port) == ("b", 2 << 20, 9000)
    assert [other.base for other in others] == ["a"]
    for name in (None, "c"):
        with pytest.raises(SpecError, match=r"several bases \(a, b\); say which one to examine, as in --base a"):
            _specs(file, name, None)


def test_of_one_base_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    assert _specs(None, None, None)[0].base == "smollm2"
    file = tmp_path / "spec.yaml"
    file.write_text("base: a\npool_bytes: 1MiB\n")
    found, _ = _specs(file, "b", 9000)
    assert (found.base, found.pool_bytes, found.port) == ("b", 1 << 20, 9000)
    file.write_text("pool: 1\n")
    with pytest.raises(SpecError, match="pool: "):
        _specs(file, None, None)
