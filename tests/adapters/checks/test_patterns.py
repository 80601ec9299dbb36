"""Patterns of modules: the same values as PEFT's regular expressions give, and none that runs away."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loray.adapters.peft_format import MAX_CHARACTERS, MAX_PATTERNS, ModulePatterns
from loray.errors import UnsupportedError
from loray.spec import MLP_MODULES

PATHS = [
    f"model.layers.{layer}.{'mlp' if module in MLP_MODULES else 'self_attn'}.{module}"
    for layer in (0, 1, 2, 11, 111)
    for module in ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
]
_WORDS = ["q_proj", "v_proj", "o_proj", "layers", "model", "self_attn", "mlp", "_", "proj", "1", "11"]
_REGEXES = [
    ".",
    r"\.",
    r"\d",
    r"\d+",
    ".*",
    "[0-2]",
    "(q|v)",
    "(?:q|v|up)_proj",
    "(1|11)?",
    "l.yers",
    "[a-z_]+",
    r"\w+?",
    "1*",
]
_PIECES = st.sampled_from([*_WORDS, *_REGEXES])


def of_peft(patterns: dict[str, float], path: str) -> float | None:
    return patterns.get(get_pattern_key(patterns.keys(), path))


@given(st.lists(st.lists(_PIECES, min_size=1, max_size=6).map("".join), min_size=1, max_size=4, unique=True))
def test_values_are_pefts(written: list[str]) -> None:
    patterns = {pattern: float(i) for i, pattern in enumerate(written, 1)}
    ours = ModulePatterns("alpha_pattern", patterns, source="a")
    for path in PATHS:
        assert ours.value(path, -1) == (of_peft(patterns, path) or -1), (patterns, path)


@pytest.mark.parametrize(
    "pattern",
    [
        "layers.1.self_attn.q_proj",
        "^model.layers.1.mlp.up_proj",
        r"model\.layers\.(0|1|2)\.self_attn\.(q|v)_proj$",
        "layers.1.1.mlp.up_proj",
        "layers.(0|111).*",
        "q_proj|v_proj",
        ".*",
        "a|.*mlp.*",
        "",
    ],
)
def test_forms_that_people_write(pattern: str) -> None:
    ours = ModulePatterns("rank_pattern", {pattern: 7}, source="a")
    for path in PATHS:
        assert ours.value(path, 4) == (of_peft({pattern: 7}, path) or 4), path
        assert bool(re.match(rf"(.*\.)?({pattern})$", path)) == (ours.value(path, 4) == 7)


def test_patterns_that_run_away_are_refused() -> None:
    for pattern in [
        "(([a-z_0-9.]+)+)+!",
        "(a+)+$",
        "(.*)*x",
        "(a|a)*b",
        "(?=x)",
        r"(x)\1",
        "a{1,9}",
        "[^a]",
        "(q",
        "[",
    ]:
        with pytest.raises(UnsupportedError, match=r"adapter x: alpha_pattern: the pattern .* name the modules by"):
            ModulePatterns("alpha_pattern", {pattern: 1}, source="adapter x")


def test_work_is_bounded() -> None:
    """Python's `re` needs exponential time for the first of these."""
    for pattern in ["(.|.)" * 80 + "!", ".*" * 200 + "!", "(.|.)?" * 80 + "!"]:
        ours = ModulePatterns("alpha_pattern", {pattern: 1}, source="a")
        assert ours.value(PATHS[0], 5) == 5
    wide = ModulePatterns("alpha_pattern", {".*" * 250 + str(i): 1 for i in range(MAX_PATTERNS)}, source="a")
    with pytest.raises(UnsupportedError, match="too many steps"):
        [wide.value(path, 5) for path in PATHS * 100]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([1], "not an object"),
        ({"q_proj": "8"}, "not a finite number"),
        ({"q_proj": True}, "not a finite number"),
        ({"q_proj": float("inf")}, "not a finite number"),
        ({"q_proj": 10**400}, "not a finite number"),
        ({"q" * (MAX_CHARACTERS + 1): 1}, "has more than"),
        ({f"{i}.*": 1 for i in range(MAX_PATTERNS + 1)}, "too many patterns"),
    ],
)
def test_what_is_no_table_of_numbers(raw: object, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ModulePatterns("alpha_pattern", raw, source="a")


def test_many_paths_are_a_table() -> None:
    """As a conversion writes that gives every module a rank of its own."""
    every = {path.removeprefix("model."): i for i, path in enumerate(PATHS, 1)}
    ours = ModulePatterns("rank_pattern", every | {"q_proj": 99}, source="a")
    assert [ours.value(path, 0) for path in PATHS] == list(range(1, len(PATHS) + 1))
    assert ours.value("model.layers.7.self_attn.q_proj", 0) == 99
