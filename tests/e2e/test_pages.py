"""The commands of the guide's pages, as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loray.cli.plan import measured
from tests.conftest import REPOSITORY
from tests.e2e.pages import Block, read_page, shell, with_values
from tests.fixtures.cluster import free_port
from tests.fixtures.tiny import write_checkpoint

COLLEAGUES = REPOSITORY / "docs" / "howto" / "colleagues.md"
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["serve", "up"])
def test_a_server_for_colleagues(variant: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "tiny")  # `loray base add tiny` takes this folder
    values = {"LORAY_HOME": str(tmp_path / "home"), "BASE": "tiny", "PORT": str(free_port())}
    variables, *blocks = read_page(COLLEAGUES, variant)
    assert len(blocks) >= 8
    _run([with_values(variables, values), *blocks], tmp_path, values["LORAY_HOME"])


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path) -> None:
    """On a tiny base of the same name, at a free port."""
    write_checkpoint(tmp_path / "tiny")
    home, port = str(tmp_path / "home"), str(free_port())
    measured(Path(home)).cache(Path(home))  # as the demo has done
    variables, *blocks = read_page(TUTORIAL, "")
    assert len(blocks) >= 10
    others = {"loray base add smollm2": "loray base add tiny --name smollm2", "8000": port}
    changed = [block.changed(others) for block in blocks]
    assert sum(block != other for block, other in zip(blocks, changed, strict=True)) >= 4
    _run([with_values(variables, {"LORAY_HOME": home}), *changed], tmp_path, home)


def _run(blocks: list[Block], folder: Path, home: str) -> None:
    """One after the other, in one shell; at the end nothing of `home` is left running."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LORAY_", "RAY_"))}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    try:
        with shell(folder, env) as opened:
            for block in blocks:
                block.check(*opened.run(block))
    finally:
        down = [sys.executable, "-m", "loray.cli.main", "down"]
        subprocess.run(down, env=env | {"LORAY_HOME": home}, check=True, stdout=subprocess.DEVNULL)


def test_what_a_block_prints(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n<!-- not run: this -->\n```bash\nexit\n```\n"
        "```bash\nexport A=1\n```\n```bash one\necho is $A\n```\n```text\nis …\n```\n"
        "```bash other\nexit\n```\n"
        "```python\nno()\n```\n```bash\nfalse\necho so\n```\n```text\nerror: so\n```\n"
        "<!-- not run: nor that -->\n```bash\nexit\n```\n"
    )
    variables, first, last = read_page(page, "one")
    assert (first, last) == (Block("echo is $A\n", "one", "is …\n"), Block("false\necho so\n", None, "error: so\n"))
    with pytest.raises(AssertionError, match="sets"):
        with_values(variables, {"B": "2"})
    with shell(tmp_path, os.environ) as opened:
        assert opened.run(with_values(variables, {"A": "7"}))[0] == 0
        status, output = opened.run(first)
        first.check(status, output)
        with pytest.raises(AssertionError, match="and not"):
            Block(first.commands, prints="is 8").check(status, output)
        assert opened.run(last)[0] == 1
        with pytest.raises(AssertionError, match="exits with 1"):
            Block(last.commands, prints="so").check(*opened.run(last))
