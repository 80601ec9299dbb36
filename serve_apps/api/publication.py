"""From an upload to a version."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from loray.adapters.checks.files import MAX_VERA_RANK
from loray.adapters.peft_format import read_config
from loray.api.uploads import Registration
from loray.bases.registry import BaseModel, get_base
from loray.catalog import AdapterVersion
from loray.errors import RequestError, SpecError
from loray.publishing import Destination
from loray.publishing.publish import base_of
from loray.publishing.uploads import Uploads
from loray.scratch import Budget
from loray.spec import AdapterManifest
from loray.text.templates import ChatTemplate

_TORCH_BYTES = 512 << 20  # which the check of a VeRA adapter imports


def publish_upload(home: Path, asked: Registration, to: Destination, memory: Budget) -> AdapterVersion:
    """Check and publish the upload of `asked`; `home` has the bases.

    Raises as `Uploads.publish` does, and Overloaded where the check takes more of the memory than is left.
    """
    assert asked.upload is not None
    with ExitStack() as held:

        def check(folder: Path) -> None:
            _check_template(folder)
            base = get_base(home, asked.base) if asked.base else base_of(folder, home)
            held.enter_context(memory.reserve(_memory_of_check(folder, base)))

        return Uploads(to.store, to.catalog.own_tenant).publish(
            asked.upload,
            to,
            home=home,
            check=check,
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


def _memory_of_check(folder: Path, base: BaseModel) -> int:
    """Bytes. VeRA's pair is drawn to be compared: a rank in a small file asks for a large allocation."""
    config = read_config(folder)
    rank = config.get("r")
    if config.get("peft_type") != "VERA" or not isinstance(rank, int) or not 0 < rank <= MAX_VERA_RANK:
        return 0  # read in parts, or refused
    c = base.config
    widest = max(c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim)
    return _TORCH_BYTES + 2 * rank * (2 * widest) * 4  # both matrices in fp32, once more while they are drawn
