"""Adapters in the output of commands: as JSON, and as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from loray.catalog import (
    AdapterDetail,
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    Canary,
    CatalogSnapshot,
    aliases,
)
from loray.cli.output import count, pairs, table, when
from loray.client import CatalogClient
from loray.schemas.resources import AdapterResource, CanaryResource, QuarantineResource
from loray.settings import Settings
from loray.spec import AdapterManifest, Evaluation, RopeParameters, format_seconds, format_size


def entry_json(entry: AdapterEntry, bases: dict[str, str]) -> dict[str, Any]:
    ref = entry.default
    return {
        "name": entry.name,
        "version": ref.version,
        "digest": ref.digest,
        "method": ref.method,
        "base": bases.get(ref.base_fingerprint, ref.base_fingerprint[:12]),
        "context_length": ref.context_length,
        "nbytes": ref.nbytes,
        "aliases": dict(entry.aliases),
        "weights": entry.weights,
        "versions": sorted(entry.versions),
        "tenant": entry.tenant,
        "visibility": entry.visibility,
        "shared_with": sorted(entry.shared_with),
    }


def of_resources(found: Iterable[AdapterResource]) -> list[dict[str, Any]]:
    """Makes of each what `entry_json` makes."""
    fields = {"name", "version", "digest", "method", "base", "context_length", "nbytes", "aliases", "versions"}
    fields |= {"weights", "tenant", "visibility", "shared_with"}
    return [a.model_dump(mode="json", include=fields) for a in found]


def all_adapters(snapshot: CatalogSnapshot) -> list[dict[str, Any]]:
    """Makes `entry_json` of each."""
    bases = {fingerprint: name for name, fingerprint in snapshot.bases.items()}
    return [entry_json(entry, bases) for entry in snapshot.models()]


def adapters(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Shows what `entry_json` makes as a table."""
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


def seen_by(entry: AdapterEntry | AdapterResource) -> str:
    """Names the tenants that see it."""
    if entry.visibility == "public":
        return "everybody"
    return " ".join([entry.tenant, *sorted(entry.shared_with)])


def version_json(version: AdapterVersion) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.version,
        "label": version.label,
        "digest": version.digest,
        "aliases": list(version.aliases),
        "quarantine": None if version.quarantine is None else _quarantine_json(version.quarantine),
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


def detail_json(detail: AdapterDetail, version: AdapterVersion) -> dict[str, Any]:
    return {
        **version_json(version),
        "name": detail.entry.name,
        "default_version": detail.entry.default.version,
        "all_aliases": dict(detail.entry.aliases),
        "weights": detail.entry.weights,
        "versions": [version_json(v) for v in detail.versions],
        "alias_moves": [
            {
                "alias": m.alias,
                "version": m.version,
                "undone": m.undone,
                "at": m.created_at.isoformat(),
                "no_gate": m.no_gate,
            }
            for m in detail.moves
        ],
    }


def detail_of(client: CatalogClient, name: str) -> AdapterDetail:
    """Returns what `Adapters.detail` of the catalog does, of what a server tells: without the moves of aliases."""
    found = client.adapter(name)
    versions = tuple(AdapterVersion(**dict(client.version(name, number))) for number in found.versions)
    shares = ((alias, v, share) for alias, weights in found.weights.items() for v, share in weights.items())
    canaries = tuple(Canary(alias, v, share, 0) for alias, v, share in shares if v != found.aliases[alias])
    entry = AdapterEntry(
        found.name,
        found.created_at,
        tuple(v.ref for v in reversed(versions)),
        tuple(sorted(found.aliases.items())),
        found.tenant,
        found.visibility,
        frozenset(found.shared_with),
        canaries,
    )
    return AdapterDetail(entry, versions, ())


def objections(
    manifest: AdapterManifest, evaluations: Sequence[Evaluation], settings: Settings
) -> tuple[str, ...] | None:
    """Says why the gate of `settings` refuses an alias; None if the adapter is not gated."""
    if not aliases.is_gated(manifest):
        return None
    return aliases.failures(manifest, evaluations, settings.gate_tolerance, trusts_keys=settings.gate_trusts_keys)


def lineage(version: AdapterVersion, settings: Settings | None) -> Table:
    """Shows the version's properties and origin, and why the gate of `settings`, if known, refuses it an alias."""
    m: AdapterManifest = version.manifest
    passes = None
    if settings is not None and (against := objections(m, version.evaluations, settings)) is not None:
        passes = "no alias: " + "; ".join(against) if against else "passed"
    return pairs(
        [
            ("adapter", version.label),
            ("aliases", " ".join(version.aliases)),
            ("quarantine", _quarantine(version.quarantine)),
            ("description", m.description),
            ("method", f"{m.method}, rank {m.rank}, on {' '.join(m.target_modules)}"),
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


def versions(detail: AdapterDetail) -> Table:
    shares: dict[int, list[str]] = {}
    for alias, weights in detail.entry.weights.items():
        for number, percent in weights.items():
            shares.setdefault(number, []).append(f"{alias} {percent} %")
    columns = ("VERSION", "ALIASES", "SHARE", "METHOD", "PUBLISHED", "DIGEST")
    rows = [
        (
            v.version,
            " ".join(v.aliases),
            ", ".join(shares.get(v.version, ())),
            v.manifest.method,
            when(v.created_at),
            v.digest[:12],
        )
        for v in detail.versions
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


def moves(detail: AdapterDetail) -> Table:
    rows = [(when(m.created_at), m.alias, f"→ {m.version}", _remarks(m)) for m in detail.moves]
    return table(("WHEN", "ALIAS", "MOVED", ""), rows)


def _remarks(move: AliasMove) -> str:
    remarks = ["rolled back" if move.undone else None, move.no_gate and f"without the gate: {move.no_gate}"]
    return ", ".join(filter(None, remarks))


def _rope(rope: RopeParameters) -> str:
    fields = rope.to_hf().items()
    return " ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in fields)
