"""The data path of a run: tokens a second, the driver's memory, and how soon a second run can train.

    python -m benchmarks.training.data                         20 M tokens of SmolLM2's tokenizer: two minutes
    python -m benchmarks.training.data --tokens 1e9            1 G tokens: about 1 s for each 1 MB of text and core
    python -m benchmarks.training.data --tokens 1e9 --random-ids    the same path without the tokenizer's time

Documents of made-up sentences, of 600 tokens in the median, are written as JSONL. Then two processes prepare the same
run one after the other, as the driver of `loray train` does, and read the first step as a worker does. The first one
tokenises with Ray tasks, the second one finds all tokens in the cache. Memory is the largest resident set of the
process (VmHWM) until the run is prepared, and thereafter, where the epoch is planned as workers do.

--random-ids writes shards of random ids of the right number: what is left is the files, the shards and the index.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.report import machine_line, write_json
from benchmarks.world import describe_machine, load_average, run_modules
from loray.bases.registry import add_base
from loray.text.tokenizer import Tokenizer

_WORDS = 4_000_000  # of one text, of which documents are parts
_FILES = 8
_MEDIAN, _SPREAD = 600, 1.1  # of the words of a document, which a log-normal law gives
_ROWS = {"concat": 8192, "packed": 8192, "shuffled": 2048}  # tokens of the longest row


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows as they are written to --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--order", choices=list(_ROWS), default="concat")
    parser.add_argument("--cpus", type=int, default=2, help="Ray tasks at a time")
    parser.add_argument("--random-ids", action="store_true", help="do not tokenise")
    parser.add_argument("--home", type=Path, default=Path(".cache/loray-home"), help="of the base model")
    parser.add_argument("--folder", type=Path, help="for data and tokens, 8 bytes a token (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args(argv)
    base = add_base("smollm2", home=args.home.absolute())
    click.echo(machine_line(describe_machine(), load=f"{load_average():.1f}"))
    folder = Path(tempfile.mkdtemp(prefix="loray-data-benchmark-", dir=args.folder))
    try:
        started = time.perf_counter()
        num_bytes, num_documents = write_documents(folder / "data", base.path, int(args.tokens))
        click.echo(
            f"{num_documents:,} documents, {num_bytes / 1e6:,.0f} MB, in {time.perf_counter() - started:.0f} s; "
            f"{args.order}, rows of {_ROWS[args.order]:,}" + (", random ids" if args.random_ids else "")
        )
        (folder / "home").mkdir()
        (folder / "home" / "bases").symlink_to(args.home.absolute() / "bases")
        rows = []
        for name in ("first", "second"):
            rows.append(_prepared(name, folder, args))
            click.echo(_line(rows[-1]))
        write_json(args.json, {"machine": describe_machine(), "num_bytes": num_bytes, "rows": rows})
        return rows
    finally:
        shutil.rmtree(folder)


def _prepared(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    command = ["benchmarks.training.workers.data", str(folder), args.order, str(_ROWS[args.order]), str(args.cpus)]
    (found,) = run_modules([[*command, str(time.time()), *(["--random-ids"] if args.random_ids else [])]])
    return {"run": name, "load": load_average(), **found}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['run']:<7} {row['num_tokens']:>14,} tokens  ready to train after {row['prepared_s']:>7.1f} s "
        f"({row['num_tokens'] / row['prepared_s']:>12,.0f} tokens/s)  first step {row['step_s']:>6.1f} s  driver "
        f"{row['driver_bytes'] / 1e6:>5.0f} MB, {row['imported_bytes'] / 1e6:.0f} of them libraries; worker "
        f"{row['worker_bytes'] / 1e6:.0f} MB  load {row['load']:.1f}"
    )


def write_documents(folder: Path, base: Path, num_tokens: int) -> tuple[int, int]:
    """JSONL files of documents whose words are tokens of the base, some of them frequent. Returns (bytes, number)."""
    folder.mkdir()
    text, offsets = _text(base)
    rng = np.random.default_rng(1)
    num_bytes = num_documents = 0
    for number in range(_FILES):
        left = num_tokens * (number + 1) // _FILES - num_tokens * number // _FILES
        with (folder / f"{number}.jsonl").open("wb") as file:
            for length in _lengths(rng, left):
                start = int(rng.integers(len(offsets) - length))
                num_bytes += file.write(b'{"text": "%s"}\n' % text[offsets[start] : offsets[start + length] - 1])
                num_documents += 1
    return num_bytes, num_documents


def _text(base: Path) -> tuple[bytes, list[int]]:
    """A text, and where each of its words begins."""
    tokenizer = Tokenizer.load(base)
    words = [tokenizer.text_of(i) for i in range(tokenizer.num_tokens)]
    plain = np.array([w[1:] for w in words if w[:1] == " " and w[1:].isascii() and w[1:].isalpha()])
    rng = np.random.default_rng(0)
    drawn = plain[np.minimum(rng.zipf(1.3, _WORDS), len(plain)) - 1].tolist()
    offsets = np.cumsum([0, *(len(word) + 1 for word in drawn)])
    return (" ".join(drawn) + " ").encode(), offsets.tolist()


def _lengths(rng: np.random.Generator, total: int) -> Iterator[int]:
    while total > 0:
        length = int(np.exp(rng.normal(np.log(_MEDIAN), _SPREAD)).clip(5, 200_000))
        yield min(length, total)
        total -= length


if __name__ == "__main__":
    main()
