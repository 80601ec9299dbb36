"""The score card against the article's three worked scenarios, and at its thresholds."""

from __future__ import annotations

import pytest

from loray.errors import SpecError
from loray.recommend import Answers, score_methods


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        pytest.param(Answers(32768, 5, "medium", "single"), [("LoRA", 5.0), ("LongLoRA", 2.4)], id="long documents"),
        pytest.param(
            Answers(2048, 1000, "high", "distributed"),
            [("VeRA", 12.0), ("S-LoRA", 9.0), ("LoRA", 5.0)],
            id="personalisation",
        ),
        pytest.param(
            Answers(4096, 50, "medium", "distributed"), [("S-LoRA", 7.0), ("LoRA", 5.0)], id="multi-task dialogue"
        ),
        pytest.param(Answers(8192, 100), [("LoRA", 5.0)], id="at the thresholds"),
        pytest.param(Answers(8193, 101), [("VeRA", 7.0), ("LoRA", 5.0), ("LongLoRA", 0.600073242)], id="past them"),
        pytest.param(Answers(1 << 20, 1, "high"), [("VeRA", 10.02), ("LoRA", 5.0), ("LongLoRA", 3.0)], id="capped"),
        pytest.param(Answers(2, 10, "low", "distributed"), [("LoRA", 5.0)], id="ten tasks are few"),
        pytest.param(Answers(2, 11, "low", "distributed"), [("S-LoRA", 5.44), ("LoRA", 5.0)], id="eleven are not"),
    ],
)
def test_scores(answers: Answers, expected: list[tuple[str, float]]) -> None:
    found = score_methods(answers)
    assert [(s.method, s.score) for s in found] == expected
    assert all(s.reason for s in found)


def test_answers_that_make_no_sense() -> None:
    with pytest.raises(SpecError, match="number of tasks is 0"):
        Answers(1024, 0)
