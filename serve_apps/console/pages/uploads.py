"""Uploads: the files of a folder that PEFT saved, one by one, and then a name for it. As the REST API takes them."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter, ValidationError

from loray.adapters.manifest import PUBLISHED_FILES
from loray.api.uploads import Registration
from loray.bases.registry import base_names
from loray.catalog import AdapterVersion
from loray.errors import SpecError
from loray.publishing import Destination
from loray.publishing.uploads import Uploads
from loray.serving.access import check
from loray.spec import AdapterManifest, Name, Principal
from serve_apps.access import Asking, may
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.forms import MOST_SUGGESTED, Form, checked, read_form
from serve_apps.console.receiving import receive_upload
from serve_apps.console.rendering import led_to
from serve_apps.console.routing import router_of

router = router_of("/uploads")

UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
_NAME: TypeAdapter[str] = TypeAdapter(Name)


@router.get("")
@may("publish")
def show_upload(console: ConsoleDep, request: Request) -> Response:
    return console.renderer.page(
        request,
        "upload.html",
        bases=base_names(console.backend.settings.home)[:MOST_SUGGESTED],
        files=(*PUBLISHED_FILES, AdapterManifest.FILE),
    )


@router.post("")
@may("publish")
def begin_upload(console: ConsoleDep, asking: Asking) -> Response:
    return JSONResponse({"id": _uploads(console, asking).begin()}, 201)


@router.put("/{id}/files/{name}")
@may("publish")
async def put_file(
    console: ConsoleDep, request: Request, asking: Asking, id: UploadId, name: Annotated[str, Path(max_length=64)]
) -> Response:
    """One file, as it is."""
    await receive_upload(console.backend, request, asking, id, name)
    return Response(status_code=204)


@router.post("/{id}/publish")
@may("publish")
async def publish(console: ConsoleDep, request: Request, asking: Asking, id: UploadId) -> Response:
    """Check the folder as a whole and publish it; then its page is shown."""
    form = await read_form(request)
    version = await console.backend.long.run(asking.tenant, lambda: _publish(console, asking, id, form))
    bare = version.name.rpartition("/")[2]
    return led_to(request, f"/adapters/{bare}?tenant={asking.tenant}&done=published")


@router.delete("/{id}")
@may("publish")
def forget(console: ConsoleDep, asking: Asking, id: UploadId) -> Response:
    """What could not be published does not count among the uploads that are open."""
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
