"""Blocks in README, CONTRIBUTING and docs/: the parsers know each `loray …`, every recipe and spec is one, and every
other block is run by a test, or says why it is not.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from loray.recipes.defaults import complete
from loray.recipes.fields import merge
from loray.spec import FleetSpec, ServeSpec, TrainSpec
from tests.cli.documented import Block, blocks, commands, problem
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
RUN = {DOCS / "tutorial.md", DOCS / "howto" / "colleagues.md"}  # by tests/e2e/test_pages.py


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page: Path) -> None:
    shown = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language != "text"]
    lines = [words for block in shown for words in commands(block.text)]
    assert not {" ".join(words): why for words in lines if (why := problem(words)) is not None}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != REPOSITORY], ids=lambda page: page.name)
def test_blocks_that_are_not_run_say_why(page: Path) -> None:
    """Those in YAML are checked below, and those in Python run in tests/serve_apps/servers/test_snippets.py."""
    found = blocks(page.read_text(encoding="utf-8"))
    elsewhere = {"text", "yaml", "python"} | ({"bash"} if page in RUN else set())
    assert not [block.text for block in found if block.language not in elsewhere and not block.is_marked], (
        "run it in tests/e2e/test_pages.py, or write <!-- not run: reason -->; what a command prints is ```text"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_specs_are_valid(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "yaml" and not block.is_marked:
            fields = yaml.safe_load(block.text)
            if fields.keys() <= {"bases", *ServeSpec.model_fields}:
                FleetSpec.parse(fields, source=page.name)
            else:  # what it does not say has a default
                least = {"name": "tone", "data": {"train": "my.jsonl"}}
                TrainSpec.parse(complete(merge(least, fields), "small"), source=page.name)


# Blocks of README and CONTRIBUTING, which have no marks, by how they begin.
ROOT_BLOCKS = {
    "make demo": "takes minutes; continuous integration runs the tests",
    "loray base add smollm2": "the tutorial, which is run, has its steps",
    "make check": "each is what a developer and continuous integration run",
    ".venv/bin/python -m pytest tests/engine": "tests themselves",
}


def test_blocks_of_the_root_are_accounted_for() -> None:
    pages = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")]
    shown = [block.text for page in pages for block in blocks(page) if block.language not in ("python", "text")]
    assert not [text for text in shown if not text.startswith(tuple(ROOT_BLOCKS))]
    assert not [begin for begin in ROOT_BLOCKS if not any(text.startswith(begin) for text in shown)]


def test_targets_of_make_exist() -> None:
    known = set(re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = [block.text for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    named = {name for text in shown for name in re.findall(r"^make ([\w-]+)", text, re.MULTILINE)}
    assert named
    assert named <= known


def test_modules_that_are_started_exist() -> None:
    shown = [block.text for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
    started = re.compile(r"python3? -m ((?:benchmarks|jobs|loray_kernels)[\w.]*)")
    named = {name for text in shown for name in started.findall(text)}
    assert named
    assert not [name for name in named if find_spec(name) is None]


def test_pages_that_are_run_exist() -> None:
    for page in RUN:
        found = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "bash"]
        assert len([block for block in found if not block.is_marked]) >= 10


def test_commands_of_a_block() -> None:
    page = (
        "```bash\nA=1 loray base ls   # loray nothing\n"
        "KEY=$(loray keys create ann --rpm 60) && loray up | cat; echo loray no\n"
        "loray train --data a.jsonl \\\n  --name 'a b' > log\nfor f in *; do loray down; done\n"
        "cat <<'END'\nloray text\nEND\n```\n"
        "- text\n\n  <!-- not run: so -->\n  ```bash\n  loray status\n  ```\n"
    )
    first, second = blocks(page)
    assert second == Block("bash", "  loray status\n", True)
    assert not first.is_marked
    assert list(commands(first.text)) == [
        ["base", "ls"],
        ["keys", "create", "ann", "--rpm", "60"],
        ["up"],
        ["train", "--data", "a.jsonl", "--name", "a b"],
        ["down"],
    ]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("up --replicas 2", "No such option"),
        ("upp", "no command 'upp'"),
        ("adapters promotes a", "No such command"),
        ("train --method lorra", "is not one of"),
        ("adapters import", "folder is missing"),
        ("down now", "unexpected"),
        ("adapters rm tone@1", None),
        ("train RECIPE.yaml --set a=b --set c=d", None),
    ],
)
def test_what_is_refused(line: str, why: str | None) -> None:
    found = problem(line.split())
    assert (found is None) if why is None else (found is not None and why in found), found
