"""Who asks: ten well-behaved tenants, and a hostile client with keys of every kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loray.catalog import Catalog
from loray.spec import Limits
from tests.fixtures.openapi import WRONG

NUM_STREAMS = 10
_NUM_OWN = 40  # adapters and keys of the hostile tenant, which deletes and revokes them
HOSTILE, OTHER = "hostile", "other"  # tenants
ADMINISTRATORS = ("administrator", "administrator of another tenant")  # whom nothing protects the well-behaved from
_LIMITS = Limits(rpm_limit=60, tpm_limit=10_000, max_parallel_requests=2, max_adapters=4, max_jobs=0)


@dataclass(frozen=True)
class Callers:
    """`headers`: by kind of caller, the hostile client's. `known`: by kind of caller, values of parameters that exist,
    by parameter. `models`: those that the hostile client asks. `streams`: by tenant, the well-behaved one's secret.
    """

    headers: Mapping[str, Mapping[str, str]]
    known: Mapping[str, Mapping[str, Sequence[str]]]
    models: Sequence[str]
    streams: Mapping[str, str]


def make_callers(catalog: Catalog, base: str, names: Sequence[str]) -> Callers:
    """Makes tenants and keys. `names`: adapters of the tenant `default`, which everybody asks from now on.

    Administrators are given names of the hostile tenant alone: they may delete whatever they name.
    """
    for name in names:
        catalog.share(name, "public")
    for tenant in (HOSTILE, OTHER):
        catalog.create_tenant(tenant, _LIMITS if tenant == OTHER else None)
    own = [f"{HOSTILE}/tone-{number}" for number in range(_NUM_OWN)]
    versions = [catalog.version(name, 1) for name in names[:2]]
    for name in own:
        for version in versions:
            catalog.register(name, version.digest, version.manifest, ["prod"])
        catalog.set_tag(name, "team", "support")
    made: dict[str, dict[str, Any]] = {
        "infer": {"scopes": ["infer"]},
        "infer of one model": {"scopes": ["infer"], "models": [names[0]]},
        "publish": {"scopes": ["publish"]},
        "promote": {"scopes": ["promote"]},
        "train": {"scopes": ["train"]},
        "tenant's": {"scopes": ["infer", "publish", "promote", "train"]},
        "of a tenant with limits": {"scopes": ["infer", "publish", "promote", "train"], "tenant": OTHER},
        "administrator of another tenant": {"scopes": ["admin"], "tenant": OTHER},
        "administrator": {"scopes": ["infer", "admin"]},
    }
    keys = {
        kind: catalog.create_key(kind.replace("'", ""), **{"tenant": HOSTILE} | fields) for kind, fields in made.items()
    }
    spare = [catalog.create_key(f"spare-{number}", tenant=HOSTILE).key.id for number in range(_NUM_OWN)]
    streams, ids = {}, []
    for number in range(NUM_STREAMS):
        tenant = f"steady-{number}"
        catalog.create_tenant(tenant)
        key = catalog.create_key(tenant, tenant=tenant)
        streams[tenant] = key.secret
        ids.append(key.key.id)
    models, short = [base, *names, *own[:NUM_STREAMS]], [name.partition("/")[2] for name in own]
    common: dict[str, Sequence[str]] = {"alias": ["prod"], "version": ["1", "2"], "key": ["team"], "model": models}
    harmless = common | {"name": short, "id": spare, "tenant": [HOSTILE]}
    anything = common | {"name": [*short, *names, *streams], "id": [*spare, *ids], "tenant": [HOSTILE, *streams]}
    headers = {kind: {"Authorization": f"Bearer {key.secret}"} for kind, key in keys.items()}
    headers |= {"none": {}, "wrong": {"Authorization": f"Bearer {WRONG}"}}
    known = {kind: harmless if kind in ADMINISTRATORS else anything for kind in headers}
    return Callers(headers, known, models, streams)
