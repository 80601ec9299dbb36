"""The demo's three data sets, generated from a seed or taken from Python's standard library.

orders     spoken café orders → JSON; generated from a grammar, so the right answers are known
dates      a date as people write it → ISO 8601; generated in the same way
codepages  the sources of the standard library's `encodings`, as long documents

Training and held-out rows never share a prompt (orders, dates) or a file (codepages).
"""

from __future__ import annotations

import datetime
import encodings
import json
import random
from collections.abc import Callable
from pathlib import Path

Row = dict[str, object]

DRINKS = ["espresso", "flat white", "oat latte", "cappuccino", "green tea", "hot chocolate", "iced coffee", "chai"]
FOODS = ["croissant", "cinnamon roll", "cheese bagel", "blueberry muffin", "granola bowl", "tomato soup"]
SIZES = ["small", "medium", "large"]
NAMES = ["Mia", "Omar", "Lena", "Kofi", "Yuki", "Diego", "Anya", "Tom", "Priya", "Jonas", "Sofia", "Wei"]
NUMBERS = ["", "one", "two", "three", "four", "five", "six"]
MONTHS = [datetime.date(2000, m, 1).strftime("%B") for m in range(1, 13)]


def write(folder: Path) -> None:
    """Write `NAME_train.jsonl` and `NAME_eval.jsonl` for each set; every run on one machine writes the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("orders", _order), ("dates", _date)):
        rows = _distinct(make, random.Random(f"loray {name}"), 1400)
        _write(folder / f"{name}_train.jsonl", rows[:1300])
        _write(folder / f"{name}_eval.jsonl", rows[1300:])
    sources = _encodings()
    random.Random("loray codepages").shuffle(sources)
    documents: list[Row] = [{"text": p.read_text(encoding="utf-8", errors="replace")} for p in sources]
    _write(folder / "codepages_train.jsonl", documents[10:])
    _write(folder / "codepages_eval.jsonl", documents[:10])


def question(name: str, seed: int = 0) -> tuple[str, str]:
    """A held-out prompt of `orders` or `dates` and its right answer."""
    make = {"orders": _order, "dates": _date}[name]
    prompt, answer = _distinct(make, random.Random(f"loray {name}"), 1400)[1300 + seed]["messages"]  # type: ignore[misc]
    return prompt["content"], answer["content"]


def codepage(seed: int = 0) -> str:
    """The middle of a held-out code page, which the model continues."""
    sources = _encodings()
    random.Random("loray codepages").shuffle(sources)
    lines = sources[seed].read_text(encoding="utf-8", errors="replace").splitlines()
    table = next(i for i, line in enumerate(lines) if line.startswith("decoding_table"))
    return "\n".join(lines[table : table + 50]) + "\n"


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _distinct(make: Callable[[random.Random], tuple[str, str]], rng: random.Random, n: int) -> list[Row]:
    pairs: dict[str, str] = {}
    while len(pairs) < n:
        prompt, answer = make(rng)
        pairs[prompt] = answer
    return [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": a}]} for p, a in pairs.items()
    ]


def _order(rng: random.Random) -> tuple[str, str]:
    items, spoken = [], []
    for _ in range(rng.choice([1, 2, 2, 3])):
        count, drink = rng.randint(1, 6), rng.random() < 0.6
        thing = rng.choice(DRINKS if drink else FOODS)
        size = rng.choice(SIZES) if drink and rng.random() < 0.7 else None
        plural = thing + ("s" if count > 1 and not thing.endswith("s") else "")
        spoken.append(" ".join(w for w in (NUMBERS[count], size, plural) if w))
        items.append({"item": thing, "size": size, "count": count})
    name, hour, minute = rng.choice(NAMES), rng.randint(7, 18), rng.choice([0, 10, 15, 20, 30, 40, 45, 50])
    listed = spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + " and " + spoken[-1]
    clock = f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
    prompt = rng.choice(
        [
            f"Hi, {listed} please, for {name}, I'll pick it up at {clock}.",
            f"Can I get {listed} for {clock}? The name is {name}.",
            f"This is {name}. I would like to order {listed}, ready by {clock}.",
        ]
    )
    return prompt, json.dumps({"name": name, "time": f"{hour:02d}:{minute:02d}", "items": items})


def _date(rng: random.Random) -> tuple[str, str]:
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36500))
    month = MONTHS[day.month - 1]
    suffix = "th" if 10 < day.day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    written = rng.choice(
        [
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"the {day.day}{suffix} of {month} {day.year}",
            f"{month[:3]}. {day.day}{suffix}, {day.year}",
            f"{day.day}.{day.month}.{day.year}",
        ]
    )
    ask = rng.choice(["Write as ISO date: {}", "What is {} in ISO 8601?", "{} -> ISO"])
    return ask.format(written), day.isoformat()


def _encodings() -> list[Path]:
    """Files that fill a window of 2,048 tokens several times."""
    folder = Path(encodings.__file__).parent
    return sorted(p for p in folder.glob("*.py") if 9_000 < p.stat().st_size < 120_000)
