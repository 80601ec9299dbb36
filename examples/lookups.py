"""Conversations that ask for records of a long text: data that train retrieval over a long context.

    python examples/lookups.py BOOKS OUT --tokens 8100,16200,24300

BOOKS is a Parquet file with a column `text`. The first message of a row is pages of these books, with a record after
each page or two ("The ticket number of Jonas Hale is 18163. Remember it."), and a question. Each answer repeats one
record, so the loss, which is on answers alone, is retrieval's. Rows are a function of BOOKS, --tokens and --seed.
docs/guide/long-context.md tells what came of it.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from loray.bases.registry import add_base
from loray.settings import Settings
from loray.text.tokenizer import Tokenizer

_FIRST = "Anna Pavel Mia Chidi Ruth Omar Lena Jonas Ines Kenji Clara Ivan Nora Luis Greta Amir Elsa Tomas Yuki Paul"
_LAST = (
    "Berg Okafor Silva Novak Hale Sato Marsh Lund Petit Weiss Costa Brandt Olsen Rossi Kaya Moreau Fischer Tanaka "
    "Reyes Quinn"
)
_PEOPLE = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
_THINGS = ("telephone", "salary", "ticket number", "postcode", "account", "code")
_PAGE = range(401, 1600)  # characters of a paragraph that is taken
_LONG = 16_000  # tokens; longer rows have two pages for each record
_MOST = 60  # records that are asked for
_ASKED = 0.11  # the share of a row that questions and answers take, with a page for each record
_TEMPLATE = 200  # tokens at most, of the chat template's own words


def lookups(pages: Sequence[str], num_tokens: int, tokenizer: Tokenizer, draw: random.Random) -> list[dict[str, str]]:
    """Messages of about `num_tokens` tokens, in which records are asked for in another order."""
    num_pages = 2 if num_tokens > _LONG else 1
    left = num_tokens * (1 - _ASKED / num_pages) - _TEMPLATE
    parts: list[str] = []
    records: list[tuple[str, int]] = []
    for person in draw.sample(_PEOPLE, len(_PEOPLE) // 2):
        what, number = f"{draw.choice(_THINGS)} of {person}", draw.randrange(10_000, 100_000)
        new = [*draw.sample(pages, num_pages), f"The {what} is {number}. Remember it."]
        left -= len(tokenizer.encode("".join(f"{part}\n\n" for part in new), special=False))
        if left < 0:
            break
        parts += new
        records.append((what, number))
    messages: list[dict[str, str]] = []
    for what, number in draw.sample(records, min(_MOST, len(records))):
        question = f"What is the {what}?"
        messages += [
            {"role": "user", "content": question if messages else "\n\n".join([*parts, question])},
            {"role": "assistant", "content": f"The {what} is {number}."},
        ]
    return messages


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    tokenizer = Tokenizer.load(add_base(args.base, home=args.home.absolute()).path)
    texts: list[str] = pq.read_table(args.books, columns=["text"])["text"].to_pylist()
    pages = [page for text in texts for page in text.split("\n\n") if len(page) in _PAGE]
    draw = random.Random(args.seed)
    rows = [{"messages": lookups(pages, n, tokenizer, draw)} for n in args.tokens]
    pq.write_table(pa.Table.from_pylist(rows), args.out)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("books", type=Path)
    add("out", type=Path)
    add("--tokens", type=_numbers, required=True, help="of each row, divided by commas")
    add("--seed", type=int, default=1)
    add("--base", default="smollm2", help="whose tokenizer counts, or the folder of a checkpoint")
    add("--home", type=Path, default=Settings.from_env().home, help="where the base is, or is made")
    return parser


if __name__ == "__main__":
    main()
