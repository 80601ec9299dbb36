"""`loray.json`: what it says, what its digest pins, and what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loray.adapters.files import MAX_HEADER_BYTES, MAX_TENSORS
from loray.adapters.manifest import (
    ManifestDetails,
    describe,
    digest,
    manifest_json,
    read_canonical,
    read_manifest,
    validate_folder,
    verify_folder,
)
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel
from loray.errors import BaseMismatch, IntegrityError, LorayError, SpecError, UnsupportedError
from loray.methods import METHODS, vera_module
from loray.methods.vera_module import draw_pair
from loray.spec import Evaluation, RopeParameters, TrainSpec
from tests.fixtures.recipes import RECIPE

TinyBase = Callable[..., BaseModel]
PeftFolder = Callable[..., Path]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base(tiny_base: TinyBase) -> BaseModel:
    return tiny_base()


@pytest.fixture
def folder(base: BaseModel, peft_folder: PeftFolder) -> Path:
    return peft_folder(base)


def edit(folder: Path, file: str = CONFIG, **fields: object) -> None:
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
    recipe = TrainSpec.parse(RECIPE | {"adapter": {"method": "vera"}}, source="recipe")
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


def write_header(folder: Path, header: object, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def tensor(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEADERS: dict[str, tuple[object, str]] = {
    "terabytes": ({NAME: tensor([1 << 20, 1 << 20], 0, 4 << 40)}, "has .* bytes, its header describes 4,398"),
    "wrong number of bytes": ({NAME: tensor([4, 4], 0, 4)}, "wrong number of bytes"),
    "negative": ({NAME: tensor([-2, -2], 0, 16)}, "negative size"),
    "gap": ({NAME: tensor([1], 4, 8)}, "not behind those before"),
    "no number": ({NAME: tensor(["x"], 0, 4)}, "header cannot be read"),  # type: ignore[list-item]
    "no dimension": ({NAME: tensor([], 0, 4)}, "has the shape"),
    "many dimensions": ({NAME: tensor([1] * 3, 0, 4)}, "has the shape"),
    "empty": ({NAME: tensor([0, 64], 0, 0)}, "has the shape"),
    "integers": ({NAME: tensor([1], 0, 8, "I64")}, "not of F32"),
    "unknown dtype": ({NAME: tensor([1], 0, 8, "F4")}, "not of F32"),
    "many tensors": ({str(i): tensor([1], 4 * i, 4 * i + 4) for i in range(MAX_TENSORS + 1)}, "an adapter may have"),
    "nested": (b"[" * 100_000, "header cannot be read"),
    "no object": ([1], "header cannot be read"),
    "long": (b" " * (MAX_HEADER_BYTES + 1), "its header would have"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, base: BaseModel, folder: Path) -> None:
    header, message = HEADERS[case]
    write_header(folder, header, b"\0" * (4 * (MAX_TENSORS + 1) if case == "many tensors" else 8))
    for read in (validate_folder, read_adapter):
        with pytest.raises(LorayError, match=message) as e:
            read(folder, base.config)
        assert len(str(e.value)) < 1000


def test_a_length_that_no_file_has(base: BaseModel, folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(IntegrityError, match="not a safetensors file"):
        validate_folder(folder, base.config)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UnsupportedError, match="a pickle and is never read"):
        validate_folder(folder, base.config)


@pytest.mark.parametrize("method", ["lora", "vera"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 8}, "has rank .*, adapter_config.json says 8"),
        ({"r": 1 << 40}, "not a number from 1 to"),
        ({"r": 0}, "not a number from 1 to"),
        ({"r": True}, "not a number from 1 to"),
        ({"r": 4.0}, "not a number from 1 to"),
    ],
)
def test_ranks(
    base: BaseModel,
    peft_folder: PeftFolder,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    fields: dict[str, Any],
    message: str,
) -> None:
    def allocated(*_: object) -> None:
        raise AssertionError("a pair was drawn")

    monkeypatch.setattr(vera_module, "draw_pair", allocated)
    folder = peft_folder(base, method)
    edit(folder, **fields)
    with pytest.raises(IntegrityError, match=message):
        validate_folder(folder, base.config)


def test_a_rank_of_vera_is_bounded_whatever_its_tensors_have(base: BaseModel, peft_folder: PeftFolder) -> None:
    folder, rank = peft_folder(base, "vera"), METHODS["vera"].max_rank + 1
    stored = load_file(folder / WEIGHTS)
    save_file({n: torch.ones(rank) if "lambda_d" in n else t for n, t in stored.items()}, folder / WEIGHTS)
    edit(folder, r=rank)
    with pytest.raises(IntegrityError, match="not a number from 1 to"):
        validate_folder(folder, base.config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha_pattern": {"(([a-z_0-9.]+)+)+!": 1}}, "name the modules by their paths"),
        ({"rank_pattern": {"q_proj": 9}}, "has rank 4, adapter_config.json says 9"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"use_dora": True}, "not lora_A and lora_B and lora_magnitude_vector"),
    ],
)
def test_configurations(base: BaseModel, folder: Path, fields: dict[str, Any], message: str) -> None:
    edit(folder, **fields)
    with pytest.raises(LorayError, match=message):
        validate_folder(folder, base.config)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '"x"', " " * (5 << 20), "\x00"])
def test_what_is_no_configuration(base: BaseModel, folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(LorayError, match=r"adapter_config\.json"):
        validate_folder(folder, base.config)


@pytest.mark.parametrize("method", ["lora", "vera"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_are_finite(
    base: BaseModel, peft_folder: PeftFolder, method: str, dtype: torch.dtype, value: float
) -> None:
    folder = peft_folder(base, method)
    stored = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    nbytes = sum(t.nbytes for t in stored.values())
    assert validate_folder(folder, base.config).nbytes == describe(folder, base).nbytes == nbytes
    name = sorted(stored)[-1]
    stored[name].view(-1)[-1] = value
    save_file(stored, folder / WEIGHTS)
    with pytest.raises(IntegrityError, match=f"{name}.*NaN or infinite"):
        validate_folder(folder, base.config)


@pytest.mark.parametrize("nbytes", [16, 1 << 40])
def test_a_manifest_says_what_the_file_has(base: BaseModel, folder: Path, nbytes: int) -> None:
    manifest = describe(folder, base)
    validate_folder(folder, base.config, manifest)
    with pytest.raises(IntegrityError, match="its manifest says"):
        validate_folder(folder, base.config, manifest.model_copy(update={"nbytes": nbytes}))


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_a_check_needs_no_torch(base: BaseModel, peft_folder: PeftFolder, method: str) -> None:
    folder = peft_folder(base, method)
    code = (
        "import sys; from pathlib import Path; from loray.adapters.manifest import validate_folder;"
        "from loray.bases.registry import get_base;"
        f"home, name = Path({str(base.path.parent.parent)!r}), {base.name!r};"
        f"print(validate_folder(Path({str(folder)!r}), get_base(home, name).config).nbytes, 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(describe(folder, base).nbytes), "False"]


def test_a_layer_that_the_base_lacks(base: BaseModel, folder: Path) -> None:
    stored = {n.replace("layers.1.", "layers.99999999999999."): t for n, t in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS)
    with pytest.raises(BaseMismatch, match="this base has 2 layers"):
        validate_folder(folder, base.config)
