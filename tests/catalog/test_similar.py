"""Names that resemble an unknown one."""

from __future__ import annotations

import difflib

import pytest

from loray.catalog import entries
from loray.catalog.entries import similar, unknown_adapter

FEW = sorted(["tone", "tome", "dates", "legal-de", "legal-en", "Tone"])
MANY = sorted([f"customer-{i:05d}" for i in range(20_000)] + FEW)


def test_of_few_names_all_are_compared() -> None:
    for name in ("tune", "egal-de", "date", "customer"):
        assert similar(name, FEW) == difflib.get_close_matches(name, FEW, n=3, cutoff=0.6)


@pytest.mark.parametrize(
    ("name", "expected"), [("legal-d", "legal-de"), ("datess", "dates"), ("customer-0777", "customer-0777")]
)
def test_of_many_names_those_with_the_same_beginning_are_found(name: str, expected: str) -> None:
    assert any(found.startswith(expected) for found in similar(name, MANY))


@pytest.mark.parametrize("name", ["", "a", "customer-1", "zzz", "~"])
def test_of_many_names_few_are_compared(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compared: list[int] = []

    def close(word: str, names: list[str], **_: object) -> list[str]:
        compared.append(len(names))
        return []

    monkeypatch.setattr(difflib, "get_close_matches", close)
    assert similar(name, MANY) == []
    assert compared == [entries._COMPARED]


def test_a_long_name_is_neither_compared_nor_repeated() -> None:
    assert len(str(unknown_adapter("x" * 1_000_000, MANY, ()))) < 300
