"""`loray.json`: what it says, what its digest pins, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from loray.adapters.manifest import (
    ManifestDetails,
    describe,
    digest,
    manifest_json,
    read_canonical,
    read_manifest,
    verify_folder,
)
from loray.bases.registry import BaseModel
from loray.errors import BaseMismatch, IntegrityError, SpecError, UnsupportedError
from loray.methods.vera_module import draw_pair
from loray.spec import Evaluation, RopeParameters, TrainSpec

TinyBase = Callable[..., BaseModel]
PeftFolder = Callable[..., Path]

RECIPE = {
    "name": "tone",
    "adapter": {"method": "vera"},
    "data": {"train": "x.jsonl"},
    "batch": {"rows": 4},
    "optimizer": {"learning_rate": 0.001},
    "max_steps": 3,
}


@pytest.fixture
def base(tiny_base: TinyBase) -> BaseModel:
    return tiny_base()


@pytest.fixture
def folder(base: BaseModel, peft_folder: PeftFolder) -> Path:
    return peft_folder(base)


def edit(folder: Path, file: str, **fields: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_lora_is_described(base: BaseModel, folder: Path) -> None:
    manifest = describe(folder, base)
    assert (manifest.method, manifest.rank) == ("lora", 4)
    assert manifest.target_modules == ("q_proj", "v_proj")
    q, v = base.config.module_shape("q_proj"), base.config.module_shape("v_proj")
    assert manifest.num_parameters == base.config.num_layers * 4 * (sum(q) + sum(v))
    assert manifest.nbytes == 4 * manifest.num_parameters
    assert (manifest.base, manifest.base_fingerprint) == (base.name, base.fingerprint)
    assert manifest.context_length == base.config.max_position_embeddings
    assert {"adapter_config.json", "adapter_model.safetensors"} <= manifest.files.keys()
    assert manifest.projection is None
    assert manifest == read_manifest(folder) == verify_folder(folder)


def test_vera_pins_its_projections(base: BaseModel, peft_folder: PeftFolder) -> None:
    manifest = describe(peft_folder(base, "vera"), base)
    assert (manifest.method, manifest.rank) == ("vera", 16)
    p = manifest.projection
    assert p is not None
    assert p.sha256 == draw_pair(p.key, p.rank, p.max_in, p.max_out).digest
    widths = base.config.module_shape("q_proj")[0] + base.config.module_shape("v_proj")[0]
    assert manifest.num_parameters == base.config.num_layers * (2 * 16 + widths)


def test_digest_pins_everything(base: BaseModel, folder: Path) -> None:
    first = describe(folder, base)
    assert digest(describe(folder, base)) == digest(first)
    assert digest(describe(folder, base, ManifestDetails(description="other"))) != digest(first)
    (folder / "README.md").write_text("changed")
    assert digest(describe(folder, base)) != digest(first)


def test_digest_survives_the_file(base: BaseModel, folder: Path) -> None:
    rope = RopeParameters(rope_type="linear", rope_theta=10000, factor=2)
    evaluation = Evaluation(metric="loss", value=1.25, dataset="held-out")
    manifest = describe(
        folder, base, ManifestDetails(rope_parameters=rope, context_length=1024, evaluations=[evaluation])
    )
    assert manifest.method == "longlora"
    assert (manifest.context_length, manifest.rope_parameters) == (1024, rope)
    assert read_manifest(folder) == manifest
    assert read_canonical(folder) == manifest_json(manifest)


def test_recipe_and_folder_must_agree(base: BaseModel, folder: Path, peft_folder: PeftFolder) -> None:
    recipe = TrainSpec.parse(RECIPE, source="recipe")
    with pytest.raises(SpecError, match="recipe says vera"):
        describe(folder, base, ManifestDetails(recipe=recipe))
    assert not (folder / "loray.json").exists()
    vera = peft_folder(base, "vera")
    assert describe(vera, base, ManifestDetails(recipe=recipe, job_id="job-1")).recipe == recipe
    assert read_manifest(vera).job_id == "job-1"


def test_only_the_adapter_is_published(base: BaseModel, folder: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "script.py"):
        (folder / name).write_bytes(b"x")
    (folder / "checkpoint").mkdir()
    assert describe(folder, base).files.keys() <= {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def test_another_base_is_refused(tiny_base: TinyBase, folder: Path) -> None:
    with pytest.raises(BaseMismatch, match="another base"):
        describe(folder, tiny_base(hidden_size=32))
    assert not (folder / "loray.json").exists()


def test_damage_is_named(base: BaseModel, folder: Path) -> None:
    describe(folder, base)
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors is damaged"):
        verify_folder(folder)
    path.unlink()
    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors is missing"):
        verify_folder(folder)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"files": {"../../etc/passwd": "0" * 64}}, IntegrityError, "plain file name"),
        ({"format": 2}, UnsupportedError, "upgrade"),
        ({"rank": "many"}, IntegrityError, "rank"),
        ({"colour": "red"}, IntegrityError, "colour"),
    ],
)
def test_malformed_manifests(
    base: BaseModel, folder: Path, fields: dict[str, object], error: type[Exception], message: str
) -> None:
    describe(folder, base)
    edit(folder, "loray.json", **fields)
    with pytest.raises(error, match=message):
        read_manifest(folder)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="not a published adapter"):
        read_manifest(tmp_path)
    (tmp_path / "loray.json").write_text("{")
    with pytest.raises(IntegrityError, match="not valid JSON"):
        read_manifest(tmp_path)
