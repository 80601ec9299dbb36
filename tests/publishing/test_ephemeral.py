"""Ephemeral adapters: their digest follows from the weights, and stays when one is published."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loray.adapters.manifest import verify_files, verify_folder
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import BaseMismatch, IntegrityError, SpecError, UnsupportedError
from loray.publishing import Destination, ephemeral, import_folder
from loray.settings import Settings
from loray.store import AdapterStore, open_store

BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@pytest.fixture
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_equal_weights_have_equal_digests(base: BaseModel, peft_folder: Callable[..., Path], method: str) -> None:
    files = files_of(peft_folder(base, method, 1))
    first, _ = ephemeral(files, base, run="acme", step=3, created_at=BEGAN)
    later, _ = ephemeral(files, base, run="acme", step=4, created_at=BEGAN)
    other, _ = ephemeral(files_of(peft_folder(base, method, 2)), base, run="acme", step=3, created_at=BEGAN)
    assert (first.label, later.label, first.is_ephemeral) == ("~acme@3", "~acme@4", True)
    assert first.digest == later.digest != other.digest
    assert (first.method, first.base_fingerprint) == (method, base.fingerprint)


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_an_earlier_step_describes_a_later_one(base: BaseModel, peft_folder: Callable[..., Path], method: str) -> None:
    _, earlier = ephemeral(files_of(peft_folder(base, method, 1)), base, run="acme", step=3, created_at=BEGAN)
    files = files_of(peft_folder(base, method, 2))
    ref, whole = ephemeral(files, base, run="acme", step=4, created_at=BEGAN, earlier=earlier)
    assert (ref, whole) == ephemeral(files, base, run="acme", step=4, created_at=BEGAN)
    verify_files(whole, ref.digest)
    other = "vera" if method == "lora" else "lora"
    of_other = files_of(peft_folder(base, other))
    assert ephemeral(of_other, base, run="acme", step=5, created_at=BEGAN, earlier=whole)[0].method == other


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_what_was_sampled_is_published_with_its_digest(
    base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, method: str
) -> None:
    ref, files = ephemeral(
        files_of(peft_folder(base, method)), base, run="acme", step=7, created_at=BEGAN, parent="a" * 64
    )
    verify_files(files, ref.digest)
    folder = tmp_path / "promoted"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert verify_folder(folder).parent == "a" * 64
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    catalog = Catalog(settings.catalog)
    version = import_folder(folder, base, Destination("acme", AdapterStore(open_store(settings.store)), catalog))
    promoted = catalog.adapters.resolve("acme")
    assert (version.digest, promoted.digest, promoted.label) == (ref.digest, ref.digest, "acme@1")
    assert promoted.nbytes == ref.nbytes


def test_a_name_of_the_catalog_is_never_ephemeral(
    base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    to = Destination("~acme", AdapterStore(open_store(settings.store)), Catalog(settings.catalog))
    with pytest.raises(SpecError):
        import_folder(peft_folder(base), base, to)


def test_what_cannot_be_served_is_refused(
    base: BaseModel, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path]
) -> None:
    files = files_of(peft_folder(base))
    wide = tiny_base(hidden_size=128)
    with pytest.raises(BaseMismatch):
        ephemeral(files, wide, run="a", step=0, created_at=BEGAN)
    torn = {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-1]}
    with pytest.raises(IntegrityError):
        ephemeral(torn, base, run="a", step=0, created_at=BEGAN)
    with pytest.raises(UnsupportedError):
        ephemeral({**files, "adapter_config.json": b'{"peft_type": "X"}'}, base, run="a", step=0, created_at=BEGAN)


def test_files_that_are_given_are_those_of_the_digest(base: BaseModel, peft_folder: Callable[..., Path]) -> None:
    ref, files = ephemeral(files_of(peft_folder(base)), base, run="a", step=0, created_at=BEGAN)
    with pytest.raises(IntegrityError, match="another adapter"):
        verify_files(files, "0" * 64)
    weights = bytearray(files["adapter_model.safetensors"])
    weights[-1] ^= 1
    with pytest.raises(IntegrityError, match="adapter_model"):
        verify_files({**files, "adapter_model.safetensors": bytes(weights)}, ref.digest)
    for name in files:
        with pytest.raises(IntegrityError, match="incomplete"):
            verify_files({other: data for other, data in files.items() if other != name}, ref.digest)
