"""The memory of the API's container: small files that ask for much of it, and conversions of large bases."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loray.adapters.checks.files import PAIR_NAMES
from loray.adapters.pairs import PairKey, drawn_digest
from loray.adapters.peft_format import WEIGHTS_FILE, read_adapter
from loray.adapters.projections import draw_pair
from loray.bases.registry import BaseModel
from loray.publishing import Destination, import_folder
from loray.scratch import Budget
from serve_apps.api.conversions import Conversions
from tests.catalogs import sqlite_catalog
from tests.serve_apps.api.conftest import base as base
from tests.serve_apps.api.fakes import Api

LITTLE = Budget((1 << 30) - 1, "in this server's memory")

SERVER = """
import sys
from pathlib import Path
from tests.serve_apps.api.fakes import Api

home, catalog, folder, base = sys.argv[1:]
api = Api(Path(home), catalog)
upload = api.http.post("/uploads").json()["id"]
for file in Path(folder).iterdir():
    api.http.put(f"/uploads/{upload}/files/{file.name}", content=file.read_bytes())
print(api.http.post("/adapters/tone/versions", json={"upload": upload, "base": base}).status_code)
print("torch" in sys.modules)
"""


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "home", sqlite_catalog(tmp_path))
    yield api
    api.close()


@pytest.mark.parametrize("is_stored", [False, True], ids=["drawn", "stored"])
def test_a_vera_folder_is_published_without_torch(
    tmp_path: Path, api: Api, base: BaseModel, peft_folder: Callable[..., Path], is_stored: bool
) -> None:
    """By a process that has nothing but the server's modules. What was published is what engines read."""
    folder = peft_folder(base, "vera")
    if is_stored:
        tensors = load_file(folder / WEIGHTS_FILE)
        pair = draw_pair(5, 16, 128, 128)
        tensors |= dict(zip(PAIR_NAMES, (pair.a_RI.bfloat16(), pair.b_OR.half()), strict=True))
        save_file(tensors, folder / WEIGHTS_FILE)
    command = [sys.executable, "-W", "ignore", "-c", SERVER, str(api.settings.home), api.settings.catalog]
    out = subprocess.run([*command, str(folder), base.name], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["201", "False"]
    projection, pair_read = api.catalog.version("tone", 1).manifest.projection, read_adapter(folder, base.config).pair
    assert (projection is None, pair_read is None) == (False, False)
    assert projection.sha256 == pair_read.digest


def test_a_pair_of_any_rank_is_checked_in_a_few_megabytes() -> None:
    tracemalloc.start()
    drawn_digest.__wrapped__(PairKey(0, 4096, 1024, 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_where_less_than_a_gibibyte_is_left_nothing_is_converted(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], form: str
) -> None:
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    api.services.conversions = Conversions(api.settings, LITTLE)
    refused = api.http.get("/adapters/tone/versions/1/download", params={"format": form})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
    assert "1,073,741,824 bytes do not fit in this server's memory" in refused.json()["detail"]


def test_a_conversion_takes_no_more_than_its_part(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three GiB two conversions get a half each, so that both end and the server does not."""
    asked: list[int] = []
    monkeypatch.setattr(
        "serve_apps.api.conversions.command_of",
        lambda form, ref, target, max_bytes: asked.append(max_bytes) or ["false"],  # type: ignore[func-returns-value]
    )
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    for max_bytes in (3 << 30, 64 << 30):
        api.services.conversions = Conversions(api.settings, Budget(max_bytes, "in this server's memory"))
        api.http.get("/adapters/tone/versions/1/download", params={"format": "gguf"})
    assert asked == [3 << 29, 8 << 30]
