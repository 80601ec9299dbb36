"""What is quoted of methods' quality, and the questions that are answered."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loray.errors import SpecError
from loray.recommend import OURS, QUOTES, Answers

_PAGE = Path(__file__).parents[1] / "docs/benchmarks/quality.md"
_TASKS = {"E2E, BLEU": "e2e", "AG News, exact match": "ag_news"}


def test_our_own_figures_are_those_of_the_page() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    for quote in (quote for quote in QUOTES if quote.source == OURS):
        method, _, modules = quote.settings.partition(" on ")
        named, column = {
            "q, v": (method, 5),
            "q, k, v, o": (f"{method}, attention", 4),
            "all linear layers": (f"{method}, all linear layers", 4),
        }[modules]
        (row,) = re.findall(rf"\| {_TASKS[quote.task]} \| {named} \|.*", page)
        assert row.split(" | ")[column] == f"{quote.score:.1f} ± {quote.spread:.1f}"
        assert f"{quote.trained_parameters:,}" in page


def test_answers_that_make_no_sense() -> None:
    with pytest.raises(SpecError, match="number of tasks is 0"):
        Answers(1024, 0)
