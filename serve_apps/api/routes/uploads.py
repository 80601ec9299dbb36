"""Routes of uploads: an adapter's files come one by one, through a file on disk into the store."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Path, Request

from loray.schemas.resources import FileResource, UploadResource
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import ServicesDep
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console import Service, receive_upload

router = router_of("uploads")

_CHUNK = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

UploadId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="`id` of an upload")]
FileName = Annotated[str, Path(max_length=64, description="`adapter_config.json`, `adapter_model.safetensors`, …")]
IdempotencyKey = Annotated[
    str | None, Header(max_length=255, description="equal keys of one tenant give the same upload")
]


@router.post("/uploads", status_code=201, responses=responses(403, 409))
@may("publish")
def begin_upload(service: Service, idempotency_key: IdempotencyKey = None) -> UploadResource:
    """Begin to upload the folder of an adapter. Its files follow; then a version is made of it.

    It is not an adapter until then, and is forgotten after a day. 409: too many are not published yet.
    """
    return service.begin_upload(idempotency_key)


@router.get("/uploads/{id}", responses=responses(404))
@may("publish")
def get_upload(service: Service, id: UploadId) -> UploadResource:
    """Tell which files have come: an upload that broke off is continued with the others."""
    return service.upload(id)


@router.put(
    "/uploads/{id}/files/{name}",
    responses=responses(403, 404, 409, 411),
    openapi_extra={"requestBody": {"content": _CHUNK, "required": True}},
)
@may("publish")
async def put_file(
    services: ServicesDep, request: Request, asking: CurrentPrincipal, id: UploadId, name: FileName
) -> FileResource:
    """Send one file of the folder, as it is, with its Content-Length. A file of the same name is replaced.

    403: the tenant would store more than it may. 409: it is published already. 411: without a length. 503: too many
    files are being sent.
    """
    return await receive_upload(services, request, asking, id, name)


@router.delete("/uploads/{id}", status_code=204, responses=responses(403, 404))
@may("publish")
def delete_upload(service: Service, id: UploadId) -> None:
    """Forget an upload and its files. A version that was made of it stays."""
    service.delete_upload(id)
