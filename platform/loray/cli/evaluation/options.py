"""Arguments and options of the commands of `loray eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
from pydantic import ValidationError

from loray.cli.output import json_option
from loray.spec import AnyDType, DType, RopeScaling


class _Numbers(click.ParamType[tuple[float, ...]]):
    """`2048` or `2048,4096`."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self._kind = kind
        self.name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers; separate them by commas", param, ctx)


class _Rope(click.ParamType[RopeScaling]):
    """`linear:2`."""

    name = "rope"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> RopeScaling:
        kind, _, factor = str(value).partition(":")
        try:
            return RopeScaling.model_validate({"type": kind, "factor": factor})
        except ValidationError:
            self.fail(f"{value!r} is not TYPE:FACTOR, such as linear:2, ntk:2 or yarn:4", param, ctx)


class Where(click.ParamType[tuple[str, str]]):
    """`split=validation`."""

    name = "where"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        column, separator, wanted = str(value).partition("=")
        if not separator or not column:
            self.fail(f"{value!r} is not COLUMN=VALUE", param, ctx)
        return column, wanted


class Options(NamedTuple):
    """The options that every measurement has."""

    model: str
    base_name: str | None
    scaling: RopeScaling | None
    original_context: int | None
    context_lengths: tuple[int, ...]
    compare: bool
    dtype: AnyDType
    device: str | None
    record: bool
    fresh: bool
    as_json: bool


def _joined(ctx: click.Context, param: click.Parameter, values: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """The values of an option that is given several times, each time with several values."""
    return tuple(number for numbers in values for number in numbers)


_MEASUREMENT = (
    click.argument("model"),
    click.option(
        "-c",
        "--context-length",
        "context_lengths",
        type=_Numbers(int),
        multiple=True,
        callback=_joined,
        metavar="TOKENS",
        help="Several: 4096,8192 (default: the model's own context, and the one that it was extended from).",
    ),
    click.option("--rope", "scaling", type=_Rope(), help="Scale RoPE: linear:2, ntk:2 or yarn:4."),
    click.option("--original-context", type=int, help="What --rope extends (default: the base's window)."),
    click.option("--base", "base_name", help="The base of a folder that does not say which."),
    click.option("--compare", is_flag=True, help="Also the base as it is, and under the adapter's RoPE."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *get_args(DType)]),
        default="auto",
        show_default=True,
        help="Of weights; auto: what the device multiplies fast.",
    ),
    click.option("--device", help="A torch device (default: cuda where there is one, else cpu)."),
    click.option("--record/--no-record", default=True, help="Record the figures of a published adapter (default)."),
    click.option("--fresh", is_flag=True, help="Compute all, also what an earlier run has computed."),
    json_option,
)

_RETRIEVAL = (
    click.option(
        "--depths",
        type=_Numbers(float),
        multiple=True,
        callback=_joined,
        metavar="SHARES",
        help="Where the key lies, from 0 to 1 (default: 0,0.25,0.5,0.75,1).",
    ),
    click.option("--samples", type=int, default=4, show_default=True, help="Prompts for a depth and length."),
    click.option("--seed", type=int, default=0, show_default=True, help="Keys are drawn from it."),
    click.option("--heatmap", "picture", type=click.Path(path_type=Path), help="Draw depth × length, as SVG."),
)


def measurement(command: Callable[..., None]) -> Callable[..., Any]:
    """Adds the argument and options of `Options`, and passes them to the command as its first argument."""

    @wraps(command)
    def gathered(**options: Any) -> None:
        ours = {name: options.pop(name) for name in Options._fields}
        command(Options(**ours), **options)

    return _with(_MEASUREMENT, gathered)


def retrieval_options(command: Callable[..., None]) -> Callable[..., None]:
    return _with(_RETRIEVAL, command)


def _with(options: Sequence[Any], command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command
