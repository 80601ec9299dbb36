"""Pages of the guide whose commands are run: blocks of bash, and below each what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_FENCED = re.compile(r"^(<!-- not run: [^\n]*-->\n)?```(\w+)?(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_END = "end of the block"


@dataclass(frozen=True)
class Block:
    """`variant`: it belongs to this way of doing it alone. `prints` None: whatever it prints is right."""

    commands: str
    variant: str | None = None
    prints: str | None = None

    @property
    def fails(self) -> bool:
        return self.prints is not None and "error:" in self.prints

    def changed(self, others: Mapping[str, str]) -> Block:
        """The same with other texts instead of some."""
        commands, prints = self.commands, self.prints
        for text, other in others.items():
            commands = commands.replace(text, other)
            prints = None if prints is None else prints.replace(text, other)
        return Block(commands, self.variant, prints)

    def check(self, status: int, output: str) -> None:
        """Raises AssertionError. Line breaks and spaces do not count, and `…` stands for anything."""
        told = f"{self.commands}\nexits with {status} and prints:\n{output}"
        assert (status != 0) == self.fails, told
        if self.prints is not None:
            parts = (re.escape(part) for part in _words(self.prints).split("…"))
            assert re.fullmatch(".*".join(parts), _words(output), re.DOTALL), f"{told}\nand not:\n{self.prints}"


def _words(text: str) -> str:
    return re.sub(r" ?… ?", "…", " ".join(text.split()))


def read_page(path: Path, variant: str) -> list[Block]:
    """The blocks of a page, without those of other variants and those that say why they are not run."""
    blocks: list[Block] = []
    for mark, language, only, content in _FENCED.findall(path.read_text(encoding="utf-8")):
        if language == "bash" and not mark:
            blocks.append(Block(content, only or None))
        elif language == "text":
            assert blocks, f"{path.name} shows what is printed before any command"
            assert blocks[-1].prints is None, f"{path.name} shows twice what one block prints"
            blocks[-1] = Block(blocks[-1].commands, blocks[-1].variant, content)
    return [block for block in blocks if block.variant in (None, variant)]


def with_values(block: Block, values: Mapping[str, str]) -> Block:
    """The block, an `export` of variables, with other values of them. It must name each, and no other."""
    pairs = dict(word.split("=", 1) for word in block.commands.split()[1:])
    assert pairs.keys() == values.keys(), f"the page sets {sorted(pairs)}, and this has values of {sorted(values)}"
    return Block("export " + " ".join(f"{name}={value}" for name, value in values.items()) + "\n")


class Shell:
    """One bash, for one block after the other."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self._folder = folder
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(env),
            text=True,
            start_new_session=True,
        )

    def run(self, block: Block) -> tuple[int, str]:
        """(0 or the status of its last command that failed, what it has printed)."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        script = self._folder / "block.sh"
        script.write_text(block.commands, encoding="utf-8")
        run = f"failed=0; trap 'failed=$?' ERR; . {script} < /dev/null; trap - ERR"
        self.process.stdin.write(f"{run}; printf '\\n%s %s\\n' '{_END}' $failed\n")
        self.process.stdin.flush()
        lines: list[str] = []
        for line in self.process.stdout:
            if line.startswith(_END):
                return int(line.removeprefix(_END)), "".join(lines)
            lines.append(line)
        raise AssertionError(f"the shell has ended in:\n{block.commands}\n{''.join(lines)}")

    def close(self) -> None:
        """Ends it with all that it has started and that has not gone to a group of its own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@contextmanager
def shell(folder: Path, env: Mapping[str, str]) -> Iterator[Shell]:
    opened = Shell(folder, env)
    try:
        yield opened
    finally:
        opened.close()
