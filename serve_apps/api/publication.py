"""From an upload to a version."""

from __future__ import annotations

from pathlib import Path

from loray.api.uploads import Registration
from loray.catalog import AdapterVersion
from loray.errors import RequestError, SpecError
from loray.publishing import Destination
from loray.publishing.uploads import Uploads
from loray.spec import AdapterManifest
from loray.text.templates import ChatTemplate


def publish_upload(home: Path, asked: Registration, to: Destination) -> AdapterVersion:
    """Check and publish the upload of `asked`; `home` has the bases. Raises as `Uploads.publish` does."""
    assert asked.upload is not None
    return Uploads(to.store, to.catalog.own_tenant).publish(
        asked.upload,
        to,
        home=home,
        check=_check_template,
        base=asked.base,
        licence=asked.licence,
        description=asked.description,
        tool_parser=asked.tool_parser,
    )


def _check_template(folder: Path) -> None:
    template = folder / AdapterManifest.TEMPLATE_FILE
    if template.is_file():
        try:
            ChatTemplate(template.read_text(encoding="utf-8", errors="replace"))
        except RequestError as e:
            raise SpecError(str(e)) from e
