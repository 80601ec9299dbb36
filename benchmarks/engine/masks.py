"""What it costs that answers must match a JSON schema, by the time of a step.

    python -m benchmarks.engine.masks [--rows 32] [--tokens 96] [--repeat 5] [--json FILE]

SmolLM2-135M in bf16; the engine runs in this process and has as many requests as rows, with prompts of 64 tokens each
and answers of equal length. Each repetition runs in turn, every second one in the opposite order:

    free            no request has a constraint
    token by token  each request has a schema whose JSON does not end before; nobody asks which tokens it forces, as on
                    a GPU, so that a step has as many tokens as a free one: what masks cost
    schema          the same as the engine does it on a CPU: it asks, and takes such tokens together; to be compared by
                    the time of a token

and, before the first schema, free requests as well: what masks cost where they have never been used. The claim is that
a step of `token by token` takes at most 1.05 of a free one's time. Only steps of all rows after their prompts count.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from benchmarks.serving.models import bench_base
from benchmarks.serving.recorder import EngineRecorder, EngineStep
from benchmarks.stepping import finish
from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.engine import Engine
from loray.engine.request import Request
from loray.errors import RequestError
from loray.spec import AdapterRef, Constraint, GenerateRequest, SamplingParams, ServeSpec
from serve_apps.python_gc import freeze_garbage

PROMPT_TOKENS = 64
FIRST, FREE, SINGLE, SCHEMA = "free, at first", "free", "token by token", "schema"
_WAYS = (FREE, SINGLE, SCHEMA)
_CLAIM = 1.05
_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "count": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"enum": ["small", "large", "new"]}, "maxItems": 3},
        "price": {"type": "number"},
        "sold": {"type": "boolean"},
    },
    "required": ["name", "count", "tags", "price", "sold"],
    "additionalProperties": False,
}
_ENDLESS = Constraint.from_schema({"type": "array", "items": _ITEM, "minItems": 10_000})


class Pass(NamedTuple):
    """One pass of one way. `step_ms` is the median; a step computes `tokens` tokens on average, in all rows."""

    step_ms: float
    token_ms: float
    tokens: float
    num_steps: int


def main(argv: Sequence[str] | None = None) -> Mapping[str, list[Pass]]:
    args = _parser().parse_args(argv)
    described = describe_machine()
    click.echo(machine_line(described, load=f"{load_average():.2f}"))
    passes: dict[str, list[Pass]] = {way: [] for way in (FIRST, *_WAYS)}
    with _engine(bench_base(args.model), args) as (engine, recorder):
        _run(engine, recorder, FREE, args)  # compiles kernels, starts threads
        for _ in range(args.repeat):
            passes[FIRST].append(_run(engine, recorder, FREE, args))
        for i in range(args.repeat):
            for way in _WAYS[:: -1 if i % 2 else 1]:
                passes[way].append(_run(engine, recorder, way, args))
    click.echo(f"{args.rows} rows; medians of {args.repeat} (lowest–highest); a ratio is by the free step beside it")
    click.echo(f"{'':<16}{'step ms':>22}{'ratio':>20}{'ms a token':>12}{'tokens a step':>15}{'forced':>8}")
    for way, found in passes.items():
        click.echo(_line(way, found, passes[FREE], args.rows))
    ratio = statistics.median(ratios(passes[SINGLE], passes[FREE]))
    click.echo(f"a step with masks ≤ {_CLAIM} of a free one: {ratio:.3f}, {'met' if ratio <= _CLAIM else 'MISSED'}")
    write_json(
        args.json,
        {"machine": described, "passes": {way: [p._asdict() for p in found] for way, found in passes.items()}},
    )
    return passes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help="a base of this machine (default %(default)s)")
    add("--rows", type=int, default=32, help="requests at once (default %(default)s)")
    add("--tokens", type=int, default=96, help="of each answer (default %(default)s)")
    add("--repeat", type=one_or_more, default=5, help="passes of each way (default %(default)s)")
    add("--temperature", type=float, default=1.0, help="of all requests (default %(default)s)")
    add("--json", type=Path, help="write the figures there too")
    return parser


@contextmanager
def _engine(base: BaseModel, args: argparse.Namespace) -> Iterator[tuple[Engine, EngineRecorder]]:
    kv_bytes = 4 * base.config.num_layers * base.config.num_kv_heads * base.config.head_dim
    spec = ServeSpec(
        base=base.name,
        pool_bytes=2 * kv_bytes * args.rows * (PROMPT_TOKENS + args.tokens),
        max_num_seqs=args.rows,
        max_num_batched_tokens=max(2048, 16 * args.rows),
        itl_slo_ms=1e6,  # all prompts in one step, so that all rows begin together
        enable_prefix_caching=False,
    )

    def no_adapters(ref: AdapterRef) -> Any:
        raise AssertionError(ref)

    engine = build_engine(spec, base, no_adapters)
    recorder = EngineRecorder(engine)
    freeze_garbage()
    try:
        yield engine, recorder
    finally:
        engine.close()


def _run(engine: Engine, recorder: EngineRecorder, way: str, args: argparse.Namespace) -> Pass:
    """One pass. SystemExit if an answer ended before its last token."""
    grammars, forced = engine._grammars, engine._grammars.forced

    def none(requests: Sequence[Request]) -> Iterator[tuple[Request, int]]:
        return iter(())

    if way == SINGLE:
        grammars.forced = none  # type: ignore[method-assign]
    recorder.steps.clear()
    num_tokens, begun, num_before = 0, set[str](), 0
    try:
        for request in _requests(engine.base, way, args):
            engine.add(request)
        for output in finish(engine):
            num_tokens += output.token_id is not None
            if output.request_id not in begun:
                begun.add(output.request_id)
                num_before = len(recorder.steps)
    except RequestError as e:
        raise SystemExit(f"{way}: {e}") from e
    finally:
        grammars.forced = forced  # type: ignore[method-assign]
    if num_tokens != args.rows * args.tokens:
        raise SystemExit(f"{way}: {num_tokens} tokens came, not {args.rows} × {args.tokens}")
    return figures(recorder.steps[num_before:], args.rows)


def _requests(base: BaseModel, way: str, args: argparse.Namespace) -> Iterator[GenerateRequest]:
    vocab = base.config.vocab_size
    for row in range(args.rows):
        prompt = tuple((7919 * row + 31 * k) % (vocab - 200) + 100 for k in range(PROMPT_TOKENS))
        params = SamplingParams(
            max_tokens=args.tokens,
            temperature=args.temperature,
            seed=row,
            ignore_eos=True,
            structured=None if way == FREE else _ENDLESS,
        )
        yield GenerateRequest(f"{way}-{row}", prompt, params)


def figures(steps: Sequence[EngineStep], num_rows: int) -> Pass:
    """Of the steps that have all rows; `steps` came when each had its first token."""
    found = [step for step in steps if step.num_rows == num_rows]
    if not found:
        raise SystemExit("no step had all rows; ask for more --tokens")
    seconds, tokens = sum(s.seconds for s in found), sum(s.num_tokens for s in found)
    return Pass(
        1e3 * statistics.median(s.seconds for s in found), 1e3 * seconds / tokens, tokens / len(found), len(found)
    )


def ratios(passes: Sequence[Pass], free: Sequence[Pass]) -> list[float]:
    """Of the steps' times, pass by pass."""
    return [p.step_ms / f.step_ms for p, f in zip(passes, free, strict=True)]


def _line(way: str, passes: Sequence[Pass], free: Sequence[Pass], num_rows: int) -> str:
    step_ms = [p.step_ms for p in passes]
    found = ratios(passes, free)
    step = f"{statistics.median(step_ms):.2f} ({min(step_ms):.2f}–{max(step_ms):.2f})"
    ratio = f"{statistics.median(found):.3f} ({min(found):.2f}–{max(found):.2f})"
    token_ms, tokens = statistics.median(p.token_ms for p in passes), statistics.mean(p.tokens for p in passes)
    return f"{way:<16}{step:>22}{ratio:>20}{token_ms:>12.3f}{tokens:>15.2f}{1 - num_rows / tokens:>8.1%}"


if __name__ == "__main__":
    main()
