"""The page /docs of both applications: Swagger UI on the application's own OpenAPI document. Its files come with loray:
a page that loaded them from another host could be made to act as whoever is logged in at the console.
"""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import FileResponse, HTMLResponse, Response

from loray.errors import NotFoundError
from serve_apps.access.permission import may

# Of HTML. Pictures in style sheets are data: URLs. Nothing inline runs, and nothing is asked of another host.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FOLDER = FilePath(__file__).parent / "swagger"
_FILES = {name: _FOLDER / name for name in ("swagger-ui-bundle.js", "swagger-ui.css", "swagger.js")}
_A_DAY = {"Cache-Control": "public, max-age=86400", "X-Content-Type-Options": "nosniff"}
_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>loray</title><link rel="stylesheet" href="docs/static/swagger-ui.css"></head>
<body>
<div id="swagger-ui"></div>
<script src="docs/static/swagger-ui-bundle.js"></script>
<script src="docs/static/swagger.js"></script>
</body>
</html>
"""

router = APIRouter(include_in_schema=False)


@router.get("/docs")
@may("open")
async def show_docs() -> Response:
    return HTMLResponse(_PAGE, headers=PAGE_HEADERS)


@router.get("/docs/static/{name}")
@may("open")
async def get_docs_file(name: Annotated[str, Path(max_length=64)]) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise NotFoundError(f"there is no file {name!r}")
    return FileResponse(path, headers=_A_DAY)
