"""The memory of the API's container: small files that ask for much of it, and conversions of large bases."""

from __future__ import annotations

import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loray.adapters.files import PAIR_NAMES
from loray.adapters.peft_format import WEIGHTS_FILE, read_adapter
from loray.bases.registry import BaseModel
from loray.methods.pairs import PairKey, drawn_digest
from loray.methods.vera_module import draw_pair
from loray.publishing import Destination, convert, import_folder
from loray.publishing.convert import environment_of
from serve_apps.api.conversions import Conversions
from tests.fixtures.api import Api

SERVER = """
import sys
from pathlib import Path
from tests.fixtures.api import Api

home, catalog, base, *folders = sys.argv[1:]
api = Api(Path(home), catalog)
for folder in folders:
    upload = api.http.post("/uploads").json()["id"]
    for file in Path(folder).iterdir():
        api.http.put(f"/uploads/{upload}/files/{file.name}", content=file.read_bytes())
    print(api.http.post("/adapters/tone/versions", json={"upload": upload, "base": base}).status_code)
    print("torch" in sys.modules)
"""


def test_vera_folders_are_published_without_torch(
    tmp_path: Path, api: Api, base: BaseModel, peft_folder: Callable[..., Path]
) -> None:
    """By a process that has nothing but the server's modules, of a pair that is drawn and of one that is stored. What
    was published is what engines read.
    """
    drawn, stored = (peft_folder(base, "vera") for _ in range(2))
    tensors = load_file(stored / WEIGHTS_FILE)
    pair = draw_pair(5, 16, 128, 128)
    tensors |= dict(zip(PAIR_NAMES, (pair.a_RI.bfloat16(), pair.b_OR.half()), strict=True))
    save_file(tensors, stored / WEIGHTS_FILE)
    command = [sys.executable, "-W", "ignore", "-c", SERVER, str(api.settings.home), api.settings.catalog, base.name]
    out = subprocess.run([*command, str(drawn), str(stored)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["201", "False"] * 2
    for version, folder in ((1, drawn), (2, stored)):
        projection = api.catalog.adapters.version("tone", version).manifest.projection
        pair_read = read_adapter(folder, base.config).pair
        assert projection is not None
        assert pair_read is not None
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
    api.services.conversions = Conversions(api.settings, lambda: 1 << 30)
    refused = api.http.get("/adapters/tone/versions/1/download", params={"format": form})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "60")
    assert "takes 1.1 GB of memory at least, and this server has 859.0 MB for it" in refused.json()["detail"]


def test_a_conversion_takes_no_more_than_its_part(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left when it begins, and of much memory not all."""
    asked: list[int] = []
    monkeypatch.setattr(
        "serve_apps.api.conversions.command_of",
        lambda form, ref, target, max_bytes: asked.append(max_bytes) or ["false"],  # type: ignore[func-returns-value]
    )
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    left = [5 << 30, 64 << 30]
    api.services.conversions = Conversions(api.settings, lambda: left[len(asked)])
    for _ in left:
        api.http.get("/adapters/tone/versions/1/download", params={"format": "gguf"})
    assert asked == [4 << 30, 8 << 30]


def test_a_conversion_beside_which_there_is_nothing_left_is_the_only_one(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    path = "/adapters/tone/versions/1/download?format=gguf"

    def check(left: int, num_cores: int) -> None:
        monkeypatch.setattr("serve_apps.api.conversions.num_cores", lambda: num_cores)
        made = api.services.conversions = Conversions(api.settings, lambda: left)
        with made._memory():
            refused = api.http.get(path)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
            assert api.http.get("/adapters").status_code == 200

    check(left=6 << 30, num_cores=8)
    check(left=64 << 30, num_cores=1)
    assert api.http.get(path).status_code == 200


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_only_files_that_a_conversion_maps_are_beside_its_memory(
    api: Api,
    base: BaseModel,
    peft_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    version = import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limit: limits.append(limit))
    for name, value in environment_of(api.settings).items():
        monkeypatch.setenv(name, value)
    (api.settings.home / "bases" / base.name / "more.bin").write_bytes(b"x" * 1000)
    convert._convert(form, version.digest, version.label, tmp_path / "made", 1 << 30)
    mapped = (base.path / "model.safetensors").stat().st_size if form == "merged" else 0
    assert limits == [((1 << 30) + mapped,) * 2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_a_conversion_that_needs_more_memory_says_so(error: Exception) -> None:
    kind, message = convert._failure(error, 3 << 29)
    assert (kind, "needs more than the 1.6 GB of memory" in message) == ("UnsupportedError", True)
    assert convert._failure(OSError(28, "No space left on device"), 1)[0] == "StoreError"
