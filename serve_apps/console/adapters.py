"""The pages of adapters: the list, an adapter with its lineage, a version, differences, aliases, canaries, uploads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, NamedTuple, get_args
from urllib.parse import urlencode

import yaml
from fastapi import Depends, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool

from loray.adapters.manifest import PUBLISHED_FILES
from loray.bases.registry import base_names
from loray.catalog import VersionSummary
from loray.catalog.entries import parse_tags
from loray.errors import SpecError
from loray.policy.auth import check
from loray.schemas.resources import AdapterResource, Registration, VersionDetail, VersionNumber
from loray.spec import (
    AdapterManifest,
    Alias,
    Method,
    Name,
    Percent,
    QualifiedName,
    TenantName,
    split_qualified,
)
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.archives import receive_upload, send_adapter
from serve_apps.console.backend import ConsoleDep, Service
from serve_apps.console.recipes import recipe_text
from serve_apps.console.rendering import MOST_SUGGESTED, checked, led_to, page_router, read_form

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
    service: Service,
    request: Request,
    search: Annotated[str, Query(max_length=96)] = "",
    base: Annotated[str, Query(max_length=96)] = "",
    method: Annotated[str, Query(max_length=16)] = "",
    tag: Annotated[str, Query(max_length=200)] = "",
    tenant: Annotated[str, Query(max_length=96)] = "",
    after: QualifiedName | None = None,
) -> Response:
    found = service.adapter_page(
        _PAGE,
        after,
        tenant=tenant or None,
        base=base or None,
        method=method or None,
        search=search or None,
        tags=parse_tags((tag,) if tag else ()),
    )
    asked = {"search": search, "base": base, "method": method, "tag": tag, "tenant": tenant}
    given = {name: value for name, value in asked.items() if value}
    return console.renderer.page(
        request,
        "adapters.html",
        adapters=found.items,
        asked=asked,
        is_filtered=bool(given),
        first="" if after is None else "?" + urlencode(given),
        more="" if found.next is None else urlencode(given | {"after": found.next}),
        choices=list(service.catalog.bases.fingerprints())[:MOST_SUGGESTED],
        methods=get_args(Method),
    )


@router.get("/adapters/{name}")
@may("read")
def show_adapter(
    console: ConsoleDep,
    service: Service,
    request: Request,
    name: AdapterName,
    before: VersionNumber | None = None,
    done: Annotated[str, Query(max_length=16)] = "",
) -> Response:
    adapter = service.adapter(name)
    page = service.catalog.adapters.versions(name, limit=_VERSIONS, before=before)
    return console.renderer.page(
        request,
        "adapter.html",
        **_places(adapter),
        adapter=adapter,
        versions=page.items,
        older=page.next,
        aliases=service.aliases(name),
        canaries=[c for i, c in enumerate(service.canaries(name)) if i < _DRAWN or c.outcome is None],
        tags=service.tags(name),
        lineage=lineage_of(page.items[:_DRAWN]),
        done=_DONE.get(done, ""),
    )


@router.get("/adapters/{name}/versions/{version}")
@may("read")
def show_version(
    console: ConsoleDep, service: Service, request: Request, name: AdapterName, version: VersionPath
) -> Response:
    found, adapter = service.version(name, version), service.adapter(name)
    recipe = found.manifest.recipe
    return console.renderer.page(
        request,
        "version.html",
        **_places(adapter),
        adapter=adapter,
        version=found,
        manifest=_manifest_text(found),
        evaluations=found.evaluations[:_EVALUATIONS],
        recipe="" if recipe is None else recipe_text(recipe, console.backend.settings.home),
    )


@router.get("/adapters/{name}/versions/{version}/download")
@may("download")
async def download(
    console: ConsoleDep, service: Service, asking: CurrentPrincipal, name: AdapterName, version: VersionPath
) -> Response:
    """Send the files as a tar archive."""
    found = await run_in_threadpool(service.record_download, name, version)
    return await send_adapter(console.backend, asking, found)


@router.get("/adapters/{name}/diff")
@may("read")
def show_difference(
    console: ConsoleDep,
    service: Service,
    request: Request,
    name: AdapterName,
    old: VersionNumber,
    new: VersionNumber,
) -> Response:
    adapter = service.adapter(name)
    before, after = (_manifest_text(service.version(name, number)).splitlines() for number in (old, new))
    lines = list(difflib.unified_diff(before, after, n=2, lineterm=""))[2:]
    return console.renderer.page(request, "difference.html", **_places(adapter), old=old, new=new, lines=lines)


@router.post("/adapters/{name}/aliases/{alias}")
@may("promote")
def promote(
    service: Service,
    request: Request,
    name: AdapterName,
    alias: Annotated[Alias, Path()],
    version: VersionNumber,
) -> Response:
    """Point the alias at the version; the gate may refuse it."""
    service.promote(name, alias, version)
    return _again(request, name, "promoted")


@router.post("/adapters/{name}/aliases/{alias}/rollback")
@may("promote")
def roll_back(
    service: Service,
    request: Request,
    name: AdapterName,
    alias: Annotated[Alias, Path()],
    revision: Annotated[int | None, Query(ge=0)] = None,
) -> Response:
    """Point the alias back at where it pointed before its last move, if it has this revision still."""
    service.rollback(name, alias, etag=None if revision is None else f'"{revision}"')
    return _again(request, name, "rolled-back")


@router.post("/adapters/{name}/aliases/{alias}/canary")
@may("promote")
def set_canary(
    service: Service,
    request: Request,
    name: AdapterName,
    alias: Annotated[Alias, Path()],
    version: VersionNumber,
    percent: Percent,
) -> Response:
    """Give the version a share of the alias's requests, or change the share of its canary."""
    service.set_canary(name, alias, version, percent)
    return _again(request, name, "divided")


@router.post("/adapters/{name}/aliases/{alias}/canary/end")
@may("promote")
def end_canary(service: Service, request: Request, name: AdapterName, alias: Annotated[Alias, Path()]) -> Response:
    """Give all requests to the version that the alias points at."""
    service.end_canary(name, alias)
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
def begin_upload(service: Service) -> Response:
    return JSONResponse({"id": service.begin_upload().id}, 201)


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
async def publish(
    console: ConsoleDep, service: Service, request: Request, asking: CurrentPrincipal, id: UploadId
) -> Response:
    """Check the folder as a whole, publish it, and show its page."""
    form = await read_form(request)
    given = {name: form.get(name) for name in ("base", "licence", "description") if form.get(name)}
    aliases = [alias for alias in form.get("aliases").replace(",", " ").split() if alias]
    asked = checked(Registration, {"upload": id, "aliases": aliases, **given})
    try:
        name = _NAME.validate_python(form.get("name"))
    except ValidationError as e:
        raise SpecError(f"the name {form.get('name')!r} is none of an adapter: {e.errors()[0]['msg']}") from e
    if asked.aliases:
        check(asking, "promote")
    await console.backend.long.run(asking.tenant, lambda: service.register(name, **asked.model_dump()))
    return led_to(request, f"/adapters/{name}?tenant={asking.tenant}&done=published")


@router.delete("/uploads/{id}")
@may("publish")
def forget(service: Service, id: UploadId) -> Response:
    """Forget an upload that could not be published, so that it does not count among those that are open."""
    service.delete_upload(id)
    return Response(status_code=204)


def _places(adapter: AdapterResource) -> dict[str, str]:
    """`here` is the path of the adapter's page, `of` the query that says whose it is."""
    bare = split_qualified(adapter.name)[1]
    return {"bare": bare, "here": f"/adapters/{bare}", "of": urlencode({"tenant": adapter.tenant})}


def _again(request: Request, name: str, done: str) -> Response:
    tenant, bare = split_qualified(name)
    query = ({} if tenant is None else {"tenant": tenant}) | {"done": done}
    return led_to(request, f"/adapters/{bare}?{urlencode(query)}")


def _manifest_text(version: VersionDetail) -> str:
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
