"""Adapters in the output of commands: as JSON, and as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from loray.catalog import AliasMove, aliases
from loray.cli.output import count, pairs, table, when
from loray.schemas.resources import AdapterResource, CanaryResource, QuarantineResource, VersionDetail
from loray.settings import Settings
from loray.spec import AdapterManifest, Evaluation, RopeParameters, format_seconds, format_size

_LISTED = frozenset(AdapterResource.model_fields) - {"created_at", "base", "base_fingerprint"}


def adapter_json(adapter: AdapterResource) -> dict[str, Any]:
    shown = adapter.model_dump(mode="json", include=set(_LISTED))
    return shown | {"base": adapter.base or adapter.base_fingerprint[:12], "versions": sorted(adapter.versions)}


def adapters(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Shows what `adapter_json` makes as a table."""
    columns = ("NAME", "SERVES", "METHOD", "BASE", "CONTEXT", "SIZE", "ALIASES", "VERSIONS", "SEEN BY", "DIGEST")
    cells = [
        (
            row["name"],
            f"@{row['version']}",
            row["method"],
            row["base"],
            row["context_length"],
            format_size(row["nbytes"]),
            " ".join(f"{alias}→{_target(row, alias)}" for alias in sorted(row["aliases"])),
            len(row["versions"]),
            "everybody" if row["visibility"] == "public" else " ".join([row["tenant"], *row["shared_with"]]),
            row["digest"][:12],
        )
        for row in rows
    ]
    return table(columns, cells, right=("CONTEXT", "SIZE", "VERSIONS"))


def _target(row: Mapping[str, Any], alias: str) -> str:
    """`3`, or with a canary `3:90%,4:10%`."""
    weights = row["weights"].get(alias)
    return ",".join(f"{v}:{percent}%" for v, percent in weights.items()) if weights else str(row["aliases"][alias])


def seen_by(adapter: AdapterResource) -> str:
    """Names the tenants that see it."""
    return "everybody" if adapter.visibility == "public" else " ".join([adapter.tenant, *adapter.shared_with])


def version_json(version: VersionDetail) -> dict[str, Any]:
    known = version.quarantine
    return {
        "name": version.name,
        "version": version.version,
        "label": version.label,
        "digest": version.digest,
        "aliases": list(version.aliases),
        "quarantine": None if known is None else _quarantine_json(known),
        "published_at": version.created_at.isoformat(),
        "evaluations": [e.model_dump(mode="json", exclude_none=True) for e in version.evaluations],
        "manifest": version.manifest.model_dump(mode="json"),
    }


def _quarantine_json(known: QuarantineResource) -> dict[str, Any]:
    until = known.refused_until
    return {
        "deaths": known.deaths,
        "died_at": known.died_at.isoformat(),
        "refused_until": None if until is None else until.isoformat(),
    }


def _quarantine(known: QuarantineResource | None) -> str | None:
    if known is None:
        return None
    until = "only suspected" if known.refused_until is None else f"refused until {when(known.refused_until)}"
    died = "a replica died on it" if known.deaths == 1 else f"{known.deaths} replicas died on it, one after another"
    return f"{until}: {died}, at {when(known.died_at)}"


def detail_json(
    adapter: AdapterResource,
    version: VersionDetail,
    versions: Sequence[VersionDetail],
    moves: Sequence[AliasMove] | None,
) -> dict[str, Any]:
    """Describes `version` and its adapter. `moves` None: a server does not tell them."""
    told = None if moves is None else [_move_json(move) for move in moves]
    return {
        **version_json(version),
        "name": adapter.name,
        "default_version": adapter.version,
        "all_aliases": adapter.aliases,
        "weights": adapter.weights,
        "versions": [version_json(v) for v in versions],
        **({} if told is None else {"alias_moves": told}),
    }


def _move_json(move: AliasMove) -> dict[str, Any]:
    return {
        "alias": move.alias,
        "version": move.version,
        "undone": move.undone,
        "at": move.created_at.isoformat(),
        "no_gate": move.no_gate,
    }


def objections(
    manifest: AdapterManifest, evaluations: Sequence[Evaluation], settings: Settings
) -> tuple[str, ...] | None:
    """Says why the gate of `settings` refuses an alias; None if the adapter is not gated."""
    if not aliases.is_gated(manifest):
        return None
    return aliases.failures(manifest, evaluations, settings.gate_tolerance, trusts_keys=settings.gate_trusts_keys)


def lineage(version: VersionDetail, gate: Sequence[str] | None) -> Table:
    """Shows the version's properties and origin, and the gate's `objections` to it, if there is one that is known."""
    m: AdapterManifest = version.manifest
    passes = None if gate is None else "no alias: " + "; ".join(gate) if gate else "passed"
    return pairs(
        [
            ("adapter", version.label),
            ("aliases", " ".join(version.aliases)),
            ("quarantine", _quarantine(version.quarantine)),
            ("description", m.description),
            ("method", f"{m.method}{f', rank {m.rank}' * bool(m.rank)}, on {' '.join(m.target_modules)}"),
            ("parameters", f"{count(m.num_parameters)} ({format_size(m.nbytes)})"),
            ("context", f"{m.context_length} tokens"),
            ("extended from", m.original_context_length and f"{m.original_context_length} tokens"),
            ("RoPE", None if m.rope_parameters is None else _rope(m.rope_parameters)),
            ("base", f"{m.base} ({m.base_fingerprint[:12]})"),
            ("converted from", None if m.derived_from is None else m.derived_from[:12]),
            ("goes on from", None if m.parent is None else _parent(m)),
            ("recipe", None if m.recipe is None else m.recipe.name),
            ("best of", m.sweep and f"sweep {m.sweep}"),
            ("job", m.job_id),
            ("data", None if m.data_fingerprint is None else m.data_fingerprint[:12]),
            ("invocation", m.invocation_tokens and f"active from tokens {' '.join(map(str, m.invocation_tokens))} on"),
            ("tool calls", m.tool_parser),
            ("chat template", None if m.chat_template is None else "its own"),
            ("licence", m.licence),
            ("created", m.created_at),
            ("digest", version.digest),
            ("gate", passes),
        ]
    )


def _parent(m: AdapterManifest) -> str:
    label = None if m.recipe is None else m.recipe.init_adapter
    return f"{label or 'an adapter'} ({(m.parent or '')[:12]})"


def evaluations(measured: Sequence[Evaluation]) -> Table:
    """Shows one row per evaluation. Empty columns are left out."""
    columns: dict[str, list[object]] = {
        "METRIC": [e.metric for e in measured],
        "VALUE": [f"{e.value:.4g}" for e in measured],
        "MODEL": [e.subject for e in measured],
        "CONTEXT": [e.context_length for e in measured],
        "DEPTH": [e.depth for e in measured],
        "STRIDE": [e.stride for e in measured],
        "MEAN OF": [e.count for e in measured],
        "DATASET": [e.dataset for e in measured],
        "MEASURED BY": [e.measured_by for e in measured],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    numbers = [name for name in shown if name not in ("METRIC", "MODEL", "DATASET", "MEASURED BY")]
    return table(list(shown), list(zip(*shown.values(), strict=True)), right=numbers)


def versions(adapter: AdapterResource, found: Sequence[VersionDetail]) -> Table:
    shares: dict[int, list[str]] = {}
    for alias, weights in adapter.weights.items():
        for number, percent in weights.items():
            shares.setdefault(number, []).append(f"{alias} {percent} %")
    columns = ("VERSION", "ALIASES", "SHARE", "METHOD", "PUBLISHED", "DIGEST")
    rows = [
        (
            v.version,
            " ".join(v.aliases),
            ", ".join(shares.get(v.version, ())),
            v.method,
            when(v.created_at),
            v.digest[:12],
        )
        for v in found
    ]
    return table(columns, rows, right=("VERSION",))


def canaries(found: Iterable[CanaryResource]) -> Table:
    """Shows canaries with what was counted of them, beside the stable version's figures in brackets."""
    rows = []
    for c in found:
        new, old = c.counts["canary"], c.counts["stable"]
        times = [f"{_ms(a)} ({_ms(b)})" for a, b in ((new.ttft_s, old.ttft_s), (new.itl_s, old.itl_s))]
        counted = (f"{new.num_requests} ({old.num_requests})", f"{new.num_errors} ({old.num_errors})", *times)
        end = "runs" if c.outcome is None else c.outcome.replace("_", " ") + (f": {c.reason}" if c.reason else "")
        rows.append((when(c.created_at), f"{c.alias} {c.stable}→{c.version}", f"{c.percent} %", *counted, end))
    columns = ("SINCE", "CANARY", "SHARE", "REQUESTS", "ERRORS", "TTFT", "ITL", "")
    return table(columns, rows, right=("SHARE", "REQUESTS", "ERRORS", "TTFT", "ITL"))


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else format_seconds(seconds)


def moves(found: Sequence[AliasMove]) -> Table:
    rows = [(when(m.created_at), m.alias, f"→ {m.version}", _remarks(m)) for m in found]
    return table(("WHEN", "ALIAS", "MOVED", ""), rows)


def _remarks(move: AliasMove) -> str:
    remarks = ["rolled back" if move.undone else None, move.no_gate and f"without the gate: {move.no_gate}"]
    return ", ".join(filter(None, remarks))


def _rope(rope: RopeParameters) -> str:
    fields = rope.to_hf().items()
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields)
