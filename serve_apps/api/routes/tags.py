"""Routes of tags: keys with values of a name, as MLflow's registered models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import Path, Response

from loray.api.resources import Page, TagChange, TagResource
from loray.spec import TagKey
from serve_apps.access import Asking, may
from serve_apps.api import examples
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, ServicesDep

router = router_of("tags")

KeyPath = Annotated[TagKey, Path(description="`team`, `stage`, …")]
_TAG = "/adapters/{name}/tags/{key}"


@router.get("/adapters/{name}/tags", responses=responses(404) | examples.page(examples.TAG, None))
@may("read")
def list_tags(services: ServicesDep, asking: Asking, name: AdapterName) -> Page[TagResource]:
    """All tags of an adapter, by key."""
    found: Mapping[str, str] = services.catalog_of(asking).tags(name)
    return Page[TagResource](items=tuple(TagResource(key=key, value=value) for key, value in found.items()))


@router.put(_TAG, responses=responses(403, 404, 409) | examples.ok(examples.TAG) | examples.ok(examples.TAG, 201))
@may("publish")
def set_tag(
    services: ServicesDep, response: Response, asking: Asking, name: AdapterName, key: KeyPath, change: TagChange
) -> TagResource:
    """Set a tag, or give it another value; 201 where the adapter did not have it. 409: it has 100 tags."""
    made = services.catalog_of(asking).set_tag(name, key, change.value)
    response.status_code = 201 if made else 200
    return TagResource(key=key, value=change.value)


@router.delete(_TAG, status_code=204, responses=responses(403, 404))
@may("publish")
def delete_tag(services: ServicesDep, asking: Asking, name: AdapterName, key: KeyPath) -> None:
    """Take a tag away."""
    services.catalog_of(asking).delete_tag(name, key)
