"""What a sweep varies: fields of a recipe with lists of values (`--grid`), or with ranges to draw from (`--random`)."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from loray.errors import SpecError

MAX_TRIALS = 1000
# Held-out losses of trials can be compared only where base and held-out rows are the same.
_FIXED = ("name", "base", "data", "evaluation", "publish", "tracking")
_DIGITS = 4  # of a drawn number

Values = Mapping[str, str]  # field → value, as `--set FIELD=VALUE` takes it
Draw = Callable[[random.Random], str]


class Axis(NamedTuple):
    """A field and its values, or what draws one."""

    path: str
    values: tuple[str, ...] = ()
    draw: Draw | None = None


def grid_axis(text: str) -> Axis:
    """`adapter.rank=8,16`. A list as a value is in brackets: `adapter.target_modules=[q_proj],[q_proj,v_proj]`."""
    path, given = _split(text, "adapter.rank=8,16")
    values = _values(given)
    if len(set(values)) < len(values):
        raise SpecError(f"{text!r} names a value twice")
    return Axis(path, values)


def random_axis(text: str) -> Axis:
    """`FIELD=loguniform(1e-5,1e-3)`, `uniform`, `randint` and `lograndint` as Ray Tune's, or values to choose from."""
    path, given = _split(text, "optimizer.learning_rate=loguniform(1e-5,1e-3)")
    match = re.fullmatch(r"(\w+)\(([^,()]+),([^,()]+)\)", given)
    if match is None:
        if "(" in given:
            raise SpecError(f"{given!r} is no range; write one as {', '.join(f'{name}(1,10)' for name in _DRAWS)}")
        choices = _values(given)
        return Axis(path, choices, lambda generator: generator.choice(choices))
    name, low, high = match.groups()
    if name not in _DRAWS:
        raise SpecError(f"there is no range {name!r}; there are {', '.join(_DRAWS)}")
    try:
        bounds = float(low), float(high)
    except ValueError as e:
        raise SpecError(f"{given!r} needs two numbers") from e
    is_log, is_whole = name.startswith("log"), name.endswith("randint")
    if not bounds[0] < bounds[1] or not all(map(math.isfinite, bounds)) or (is_log and bounds[0] <= 0):
        raise SpecError(f"{given!r}: the first number must be below the second" + (", and above 0" if is_log else ""))
    if is_whole and any(bound != int(bound) for bound in bounds):
        raise SpecError(f"{given!r} needs whole numbers")
    return Axis(path, draw=lambda generator: _DRAWS[name](generator, *bounds))


def points(grid: Sequence[Axis], ranges: Sequence[Axis], num_draws: int | None, *, seed: int) -> list[Values]:
    """The values of each trial: every point of the grid, with `num_draws` draws of the ranges for each.

    The same arguments give the same trials; a point that is drawn twice is one trial. Raises SpecError where nothing
    varies, or what may not.
    """
    if not grid and not ranges:
        raise SpecError("nothing varies: give a grid (--grid FIELD=VALUE,VALUE), or ranges (--random N FIELD=RANGE)")
    if ranges and num_draws is None:
        raise SpecError(f"{ranges[0].path} has a range: say how many draws there are (--random N)")
    if num_draws is not None and not ranges:
        raise SpecError("there is nothing to draw from: give a range, as optimizer.learning_rate=loguniform(1e-5,1e-3)")
    paths = [axis.path for axis in (*grid, *ranges)]
    _check_paths(paths)
    count = math.prod(len(axis.values) for axis in grid) * (num_draws or 1)
    if count > MAX_TRIALS:
        raise SpecError(f"these are {count:,} trials, and {MAX_TRIALS:,} are the most: vary less")
    generator = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    for fixed in product(*(axis.values for axis in grid)):
        for _ in range(num_draws or 1):
            found[(*fixed, *(axis.draw(generator) for axis in ranges if axis.draw is not None))] = None
    return [dict(zip(paths, point, strict=True)) for point in found]


def _check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if paths.count(path) > 1:
            raise SpecError(f"{path} varies twice: give it once")
        if path.partition(".")[0] in _FIXED:
            raise SpecError(
                f"{path} cannot vary: the trials of a sweep train one adapter's name on one base and one set of rows, "
                "so that their held-out losses can be compared"
            )


def _split(text: str, example: str) -> tuple[str, str]:
    path, separator, given = (part.strip() for part in text.partition("="))
    if not separator or not path or not given:
        raise SpecError(f"{text!r} is no field with values; write it as {example}")
    return path, given


def _values(text: str) -> tuple[str, ...]:
    """At the commas that are in no brackets."""
    values = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text))
    if not all(values):
        raise SpecError(f"{text!r} has an empty value")
    return values


def _number(value: float) -> str:
    return f"{value:.{_DIGITS}g}"


def _whole_between(generator: random.Random, low: float, high: float) -> str:
    return str(generator.randrange(int(low), int(high)))


def _log_between(generator: random.Random, low: float, high: float) -> float:
    return math.exp(generator.uniform(math.log(low), math.log(high)))


_DRAWS: Mapping[str, Callable[[random.Random, float, float], str]] = {
    "uniform": lambda generator, low, high: _number(generator.uniform(low, high)),
    "loguniform": lambda generator, low, high: _number(_log_between(generator, low, high)),
    "randint": _whole_between,  # without the upper bound
    "lograndint": lambda generator, low, high: str(min(int(high) - 1, int(_log_between(generator, low, high)))),
}
