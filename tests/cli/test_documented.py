"""Commands in README, CONTRIBUTING and docs/: the parsers know each `loray …`, and blocks of the tutorial and of the
how-to pages are run by a test, or say why they are not.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.documented import Block, blocks, commands, problem
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [*(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")), *sorted(DOCS.rglob("*.md"))]
RUN = {DOCS / "tutorial.md", DOCS / "guide" / "colleagues.md"}  # by tests/e2e/test_pages.py


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page: Path) -> None:
    shown = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language != "text"]
    lines = [words for block in shown for words in commands(block.text)]
    assert not {" ".join(words): why for words in lines if (why := problem(words)) is not None}


@pytest.mark.parametrize("page", sorted(DOCS.glob("howto/*.md")), ids=lambda page: page.name)
def test_blocks_that_are_not_run_say_why(page: Path) -> None:
    found = [block for block in blocks(page.read_text(encoding="utf-8")) if block.language == "bash"]
    assert found
    assert all(block.is_marked for block in found), (
        "run it in tests/e2e/test_pages.py, or write <!-- not run: reason -->"
    )


# Blocks of the README, which has no marks, by how they begin.
README_BLOCKS = {
    "make demo": "takes minutes; continuous integration runs the tests",
    "loray base add smollm2": "the tutorial, which is run, has its steps",
}


def test_blocks_of_the_readme_are_accounted_for() -> None:
    page = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    shown = [block.text for block in blocks(page) if not block.language and block.text[0].isalpha()]
    assert not [text for text in shown if not text.startswith(tuple(README_BLOCKS))]


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
