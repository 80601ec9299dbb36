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
from loray.recipes.load import ADAPTERS
from loray.recipes.many import expand
from loray.spec import FleetSpec, ServeSpec, TrainSpec
from tests.cli.documented import Block, blocks, commands, problem
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
RUN = {DOCS / "tutorial.md", DOCS / "howto" / "colleagues.md"}  # by tests/e2e/test_pages.py


def shown(page: Path) -> list[Block]:
    return list(blocks(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page: Path) -> None:
    lines = [words for block in shown(page) if block.language != "text" for words in commands(block.text)]
    assert not {" ".join(words): why for words in lines if (why := problem(words)) is not None}


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != REPOSITORY], ids=lambda page: page.name)
def test_blocks_that_are_not_run_say_why(page: Path) -> None:
    """Those in YAML are checked below, and those in Python run in tests/serve_apps/servers/test_snippets.py."""
    elsewhere = {"text", "yaml", "python"} | ({"bash"} if page in RUN else set())
    assert not [block.text for block in shown(page) if block.language not in elsewhere and not block.is_marked], (
        "run it in tests/e2e/test_pages.py, or write <!-- not run: reason -->; what a command prints is ```text"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_specs_are_valid(page: Path) -> None:
    for block in shown(page):
        if block.language == "yaml" and not block.is_marked:
            fields = yaml.safe_load(block.text)
            if fields.keys() <= {"bases", *ServeSpec.model_fields}:
                FleetSpec.parse(fields, source=page.name)
                continue
            least = {"name": "tone", "data": {"train": "my.jsonl"}}  # what it does not say has a default
            if ADAPTERS in fields:
                expand(merge(least, fields), lambda base: None)
            else:
                TrainSpec.parse(complete(merge(least, fields), "small"), source=page.name)


# Blocks of README and CONTRIBUTING, which have no marks, by how they begin.
ROOT_BLOCKS = {
    "make demo": "takes minutes; continuous integration runs the tests",
    "loray base add smollm2": "the tutorial, which is run, has its steps",
    "make check": "each is what a developer and continuous integration run",
    ".venv/bin/python -m pytest tests/engine": "tests themselves",
}


def test_blocks_of_the_root_are_accounted_for() -> None:
    texts = [b.text for page in PAGES[:2] for b in shown(page) if b.language not in ("python", "text")]
    assert not [text for text in texts if not text.startswith(tuple(ROOT_BLOCKS))]
    assert not [begin for begin in ROOT_BLOCKS if not any(text.startswith(begin) for text in texts)]


def named(pattern: str) -> set[str]:
    texts = [block.text for page in PAGES for block in shown(page)]
    found = {name for text in texts for name in re.findall(pattern, text, re.MULTILINE)}
    assert found
    return found


def test_targets_of_make_and_modules_that_are_started_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    assert named(r"^make ([\w-]+)") <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    modules = named(r"python3? -m ((?:benchmarks|jobs|loray_kernels)[\w.]*)")
    assert not [name for name in modules if find_spec(name) is None]


def test_pages_that_are_run_exist() -> None:
    for page in RUN:
        assert len([block for block in shown(page) if block.language == "bash" and not block.is_marked]) >= 10


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
