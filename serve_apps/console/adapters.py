"""The pages of adapters: the list, an adapter with its lineage, a version, differences, aliases, canaries, uploads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from itertools import islice
from typing import Annotated, NamedTuple, get_args
from urllib.parse import urlencode

import yaml
from fastapi import Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from loray.adapters.manifest import PUBLISHED_FILES
from loray.bases.registry import base_names
from loray.catalog import AdapterVersion, VersionSummary
from loray.catalog.entries import parse_tags
from loray.errors import SpecError
from loray.policy.auth import check
from loray.publishing import Destination
from loray.publishing.uploads import Uploads
from loray.schemas.resources import CanaryResource, Registration, VersionNumber
from loray.spec import (
    AdapterManifest,
    Alias,
    Method,
    Name,
    Percent,
    Principal,
    QualifiedName,
    TenantName,
    split_qualified,
)
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.archives import receive_upload, send_adapter
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.recipes import recipe_text
from serve_apps.console.rendering import MOST_SUGGESTED, Form, checked, led_to, page_router, read_form

_PAGE = 50
_VERSIONS = 20
_EVALUATIONS = 100
_DRAWN = 8  # versions and canaries
_DONE = {
    "published": "The upload is published.",
    "promoted": "The alias points at the version now.",
    "rolled-back": "The alias points where it pointed before, and has no canary.",
    "divided": "The version gets its share of the alias's requests.",
    "ended": "The canary has ended.",
}
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_WIDTH, _HEIGHT, _GAP, _ROW = 150, 26, 50, 36  # units of the lineage's picture
_COLUMNS = ("Data", "Run", "Version", "Alias")
_LONGEST = 20  # characters that fit into a box


async def _adapter_name(name: Annotated[Name, Path()], tenant: Annotated[TenantName | None, Query()] = None) -> str:
    return name if tenant is None else f"{tenant}/{name}"


AdapterName = Annotated[str, Depends(_adapter_name)]
VersionPath = Annotated[VersionNumber, Path()]
UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]

router = page_router()


@router.get("/adapters")
@may("read")
def list_adapters(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    search: Annotated[str, Query(max_length=96)] = "",
    base: Annotated[str, Query(max_length=96)] = "",
    method: Annotated[str, Query(max_length=16)] = "",
    tag: Annotated[str, Query(max_length=200)] = "",
    tenant: Annotated[str, Query(max_length=96)] = "",
    after: QualifiedName | None = None,
) -> Response:
    catalog = console.backend.catalog_of(asking)
    bases = catalog.bases.fingerprints()
    found = catalog.adapters.page(
        limit=_PAGE + 1,
        after=after or "",
        tenant=tenant or None,
        base=base or None,
        method=method or None,
        search=search or None,
        tags=parse_tags((tag,) if tag else ()),
    )
    asked = {"search": search, "base": base, "method": method, "tag": tag, "tenant": tenant}
    given = {name: value for name, value in asked.items() if value}
    more = urlencode(given | {"after": found[_PAGE - 1].name}) if len(found) > _PAGE else ""
    return console.renderer.page(
        request,
        "adapters.html",
        entries=found[:_PAGE],
        asked=asked,
        is_filtered=bool(given),
        first="" if after is None else "?" + urlencode(given),
        more=more,
        bases={fingerprint: name for name, fingerprint in bases.items()},
        choices=list(islice(bases, MOST_SUGGESTED)),
        methods=get_args(Method),
    )


@router.get("/adapters/{name}")
@may("read")
def show_adapter(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    name: AdapterName,
    before: VersionNumber | None = None,
    done: Annotated[str, Query(max_length=16)] = "",
) -> Response:
    catalog = console.backend.catalog_of(asking)
    entry = catalog.adapters.get(name)
    page = catalog.adapters.versions(name, limit=_VERSIONS, before=before)
    return console.renderer.page(
        request,
        "adapter.html",
        **_names(entry.name, entry.tenant),
        entry=entry,
        versions=page.items,
        older=page.next,
        aliases=catalog.aliases.of(name),
        canaries=[
            CanaryResource.of(s) for i, s in enumerate(catalog.canaries.of(name)) if i < _DRAWN or s.outcome is None
        ],
        tags=catalog.tags.of(name),
        lineage=lineage_of(page.items[:_DRAWN]),
        done=_DONE.get(done, ""),
    )


@router.get("/adapters/{name}/versions/{version}")
@may("read")
def show_version(
    console: ConsoleDep, request: Request, asking: CurrentPrincipal, name: AdapterName, version: VersionPath
) -> Response:
    catalog = console.backend.catalog_of(asking)
    found, entry = catalog.adapters.version(name, version), catalog.adapters.get(name)
    recipe = found.manifest.recipe
    return console.renderer.page(
        request,
        "version.html",
        **_names(entry.name, entry.tenant),
        entry=entry,
        version=found,
        manifest=_manifest_text(found),
        evaluations=found.evaluations[:_EVALUATIONS],
        recipe="" if recipe is None else recipe_text(recipe, console.backend.settings.home),
    )


@router.get("/adapters/{name}/versions/{version}/download")
@may("download")
async def download(
    console: ConsoleDep, request: Request, asking: CurrentPrincipal, name: AdapterName, version: VersionPath
) -> Response:
    """Send the files as a tar archive."""

    def find() -> AdapterVersion:
        catalog = console.backend.catalog_of(asking)
        found = catalog.adapters.version(name, version)
        catalog.audit.record("download", found.label, tenant=found.tenant, form="peft")
        return found

    return await send_adapter(console.backend, asking, await run_in_threadpool(find))


@router.get("/adapters/{name}/diff")
@may("read")
def show_difference(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    name: AdapterName,
    old: VersionNumber,
    new: VersionNumber,
) -> Response:
    catalog = console.backend.catalog_of(asking)
    entry = catalog.adapters.get(name)
    before, after = (_manifest_text(catalog.adapters.version(name, number)).splitlines() for number in (old, new))
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]
    return console.renderer.page(
        request, "difference.html", **_names(entry.name, entry.tenant), old=old, new=new, lines=lines
    )


@router.post("/adapters/{name}/aliases/{alias}")
@may("promote")
def promote(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    name: AdapterName,
    alias: Annotated[Alias, Path()],
    version: VersionNumber,
) -> Response:
    """Point the alias at the version; the gate may refuse it."""
    console.backend.catalog_of(asking).aliases.move(name, alias, version)
    return _again(request, name, "promoted")


@router.post("/adapters/{name}/aliases/{alias}/rollback")
@may("promote")
def roll_back(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    name: AdapterName,
    alias: Annotated[Alias, Path()],
    revision: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Point the alias back at where it pointed before its last move, if it has this revision still."""
    console.backend.catalog_of(asking).aliases.rollback(name, alias, expected_revision=revision)
    return _again(request, name, "rolled-back")


@router.post("/adapters/{name}/aliases/{alias}/canary")
@may("promote")
def set_canary(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    name: AdapterName,
    alias: Annotated[Alias, Path()],
    version: VersionNumber,
    percent: Percent,
) -> Response:
    """Give the version a share of the alias's requests, or change the share of its canary."""
    console.backend.catalog_of(asking).canaries.set(name, alias, version, percent)
    return _again(request, name, "divided")


@router.post("/adapters/{name}/aliases/{alias}/canary/end")
@may("promote")
def end_canary(
    console: ConsoleDep, request: Request, asking: CurrentPrincipal, name: AdapterName, alias: Annotated[Alias, Path()]
) -> Response:
    """Give all requests to the version that the alias points at."""
    console.backend.catalog_of(asking).canaries.end(name, alias)
    return _again(request, name, "ended")


@router.get("/uploads")
@may("publish")
def show_upload(console: ConsoleDep, request: Request) -> Response:
    return console.renderer.page(
        request,
        "upload.html",
        bases=base_names(console.backend.settings.home)[:MOST_SUGGESTED],
        files=(*PUBLISHED_FILES, AdapterManifest.FILE),
    )


@router.post("/uploads")
@may("publish")
def begin_upload(console: ConsoleDep, asking: CurrentPrincipal) -> Response:
    return JSONResponse({"id": _uploads(console, asking).begin()}, 201)


@router.put("/uploads/{id}/files/{name}")
@may("publish")
async def put_file(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    id: UploadId,
    name: Annotated[str, Path(max_length=64)],
) -> Response:
    """Receive one file, as it is."""
    await receive_upload(console.backend, request, asking, id, name)
    return Response(status_code=204)


@router.post("/uploads/{id}/publish")
@may("publish")
async def publish(console: ConsoleDep, request: Request, asking: CurrentPrincipal, id: UploadId) -> Response:
    """Check the folder as a whole, publish it, and show its page."""
    form = await read_form(request)
    version = await console.backend.long.run(asking.tenant, lambda: _publish(console, asking, id, form))
    bare = version.name.rpartition("/")[2]
    return led_to(request, f"/adapters/{bare}?tenant={asking.tenant}&done=published")


@router.delete("/uploads/{id}")
@may("publish")
def forget(console: ConsoleDep, asking: CurrentPrincipal, id: UploadId) -> Response:
    """Forget an upload that could not be published, so that it does not count among those that are open."""
    _uploads(console, asking).delete(id)
    return Response(status_code=204)


def _uploads(console: Console, asking: Principal) -> Uploads:
    return Uploads(console.backend.store, console.backend.catalog_of(asking).own_tenant)


def _publish(console: Console, asking: Principal, id: str, form: Form) -> AdapterVersion:
    given = {name: form.get(name) for name in ("base", "licence", "description") if form.get(name)}
    aliases = [alias for alias in form.get("aliases").replace(",", " ").split() if alias]
    asked = checked(Registration, {"upload": id, "aliases": aliases, **given})
    try:
        name = _NAME.validate_python(form.get("name"))
    except ValidationError as e:
        raise SpecError(f"the name {form.get('name')!r} is none of an adapter: {e.errors()[0]['msg']}") from e
    if asked.aliases:
        check(asking, "promote")
    to = Destination(name, console.backend.store, console.backend.catalog_of(asking), asked.aliases)
    return console.backend.publish_upload(asked, to)


def _names(name: str, tenant: str) -> dict[str, str]:
    """`here` is the path of the adapter's page, `of` the query that says whose it is."""
    bare = split_qualified(name)[1]
    return {"bare": bare, "here": f"/adapters/{bare}", "of": urlencode({"tenant": tenant})}


def _again(request: Request, name: str, done: str) -> Response:
    tenant, bare = split_qualified(name)
    query = ({} if tenant is None else {"tenant": tenant}) | {"done": done}
    return led_to(request, f"/adapters/{bare}?{urlencode(query)}")


def _manifest_text(version: AdapterVersion) -> str:
    data = version.manifest.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


class Box(NamedTuple):
    x: int
    y: int
    kind: str
    text: str
    title: str


class Lineage(NamedTuple):
    """`rows`: (data, run, version, aliases) of each version. `lines`: (x1, y1, x2, y2)."""

    rows: tuple[tuple[str, str, str, str], ...]
    boxes: tuple[Box, ...]
    lines: tuple[tuple[int, int, int, int], ...]
    width: int
    height: int
    box: tuple[int, int] = (_WIDTH, _HEIGHT)


def lineage_of(versions: Sequence[VersionSummary]) -> Lineage:
    """Draw a row for each version. What versions have in common is drawn once, beside the first of them."""
    boxes: dict[tuple[int, str], Box] = {}
    lines: list[tuple[int, int, int, int]] = []
    rows = []
    num_aliases = 0
    for row, version in enumerate(versions):
        parts = (version.data_fingerprint or "", version.run or "", f"version {version.version}")
        rows.append((parts[0] and parts[0][:12], *parts[1:], ", ".join(version.aliases)))
        before: Box | None = None
        for column, text in enumerate(parts):
            if text:
                shown = text[:12] if column == 0 else text
                before = _join(boxes, lines, before, column, row, shown, text)
        for alias in version.aliases:
            _join(boxes, lines, before, 3, num_aliases, alias, alias)
            num_aliases += 1
    height = max(len(versions), num_aliases, 1) * _ROW
    return Lineage(tuple(rows), tuple(boxes.values()), tuple(lines), 4 * _WIDTH + 3 * _GAP, height)


def _join(
    boxes: dict[tuple[int, str], Box],
    lines: list[tuple[int, int, int, int]],
    before: Box | None,
    column: int,
    row: int,
    text: str,
    title: str,
) -> Box:
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    kind = _COLUMNS[column]
    made = Box(column * (_WIDTH + _GAP), row * _ROW + 4, kind.lower(), short, f"{kind}: {title}")
    box = boxes.setdefault((column, title), made)
    if before is not None:
        line = (before.x + _WIDTH, before.y + _HEIGHT // 2, box.x, box.y + _HEIGHT // 2)
        if line not in lines:
            lines.append(line)
    return box
