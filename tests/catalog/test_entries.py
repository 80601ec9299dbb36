"""Names that resemble an unknown one."""

from __future__ import annotations

import difflib

import pytest

from loray.catalog import entries
from loray.catalog.entries import NUM_COMPARED, similar, unknown_adapter
from loray.catalog.snapshot import names_beside

FEW = sorted(["tone", "tome", "dates", "legal-de", "legal-en", "Tone"])
MANY = sorted([*(f"customer-{i:05d}" for i in range(20_000)), *FEW])


def test_of_few_names_all_are_compared() -> None:
    for name in ("tune", "egal-de", "date", "customer"):
        assert names_beside(FEW, name) == FEW
        assert similar(name, FEW) == difflib.get_close_matches(name, FEW, n=3, cutoff=0.6)


@pytest.mark.parametrize(
    ("name", "expected"), [("legal-d", "legal-de"), ("datess", "dates"), ("customer-0777", "customer-0777")]
)
def test_of_many_names_those_with_the_same_beginning_are_found(name: str, expected: str) -> None:
    assert any(found.startswith(expected) for found in similar(name, names_beside(MANY, name)))


@pytest.mark.parametrize("name", ["", "a", "customer-1", "zzz", "~"])
def test_of_many_names_few_are_compared(name: str) -> None:
    assert len(names_beside(MANY, name)) == NUM_COMPARED


def test_a_long_name_is_neither_compared_nor_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(entries.difflib, "get_close_matches")
    assert len(str(unknown_adapter("x" * 1_000_000, {"x" * 1_000_000: FEW}, ()))) < 300
