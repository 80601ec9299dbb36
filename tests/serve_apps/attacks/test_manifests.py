"""Manifests that a tenant has written by hand: their numbers stop no engine and move no limit of others."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig
from pydantic import ValidationError

from loray.adapters.manifest import ManifestDetails, describe
from loray.bases.registry import BaseModel
from loray.client import CatalogClient
from loray.engine.model.decoder import frequencies
from loray.errors import DataError, IntegrityError
from loray.spec import MAX_CONTEXT, RopeParameters, RopeType, ServeSpec
from serve_apps.gateway.bases import ServedBase
from tests.fixtures.api import Api
from tests.fixtures.engines import make_engine, request, run
from tests.fixtures.peft_adapters import TestAdapter, make_adapter

FLOATS = [5e-324, 1e-300, 1e-6, 0.5, 1.0, math.nextafter(1, 2), 2.0, 8.0, 16.0, 4096.0, 1e4, 1e6, 1e12]
FLOATS += [1e38, 1e300, 1.7e308, -1.0, 0.0, math.inf, math.nan]
INTS = [-(1 << 63), -1, 0, 1, 2, 4096, 8192, MAX_CONTEXT, MAX_CONTEXT + 1, 1 << 31, 1 << 63, 10**400]
USUAL = {
    "rope_theta": [1.0, 1e4, 1e12],
    "factor": [1.0, 2.0, 4096.0],
    "attention_factor": [None, 1e-6, 16.0],
    "beta_fast": [None, 1e-6, 1e6],
    "beta_slow": [None, 1e-6, 1e6],
    "low_freq_factor": [1e-6, 1.0],
    "high_freq_factor": [math.nextafter(1, 2), 1e6],
    "original_max_position_embeddings": [1, 8192, MAX_CONTEXT],
}
ROPES = 400


def ropes() -> Iterator[dict[str, Any]]:
    """From the edges of what is usual, half of them with one field from the edges of float and int."""
    draw = random.Random(0)
    for n in range(ROPES):
        rope = {name: draw.choice(values) for name, values in USUAL.items()}  # type: ignore[attr-defined]
        rope["rope_type"] = draw.choice(get_args(RopeType))
        if n % 2:
            field = draw.choice([*USUAL])
            rope[field] = draw.choice(INTS if field == "original_max_position_embeddings" else FLOATS)
        yield rope


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="module")
def adapter(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> TestAdapter:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "a", config, seed=1)


def with_rope(adapter: TestAdapter, number: int, rope: RopeParameters) -> TestAdapter:
    return TestAdapter(replace(adapter.ref, digest=f"{number:064x}", method="longlora"), adapter.folder, rope)


def test_rope_numbers_are_refused_or_served(base: BaseModel, adapter: TestAdapter) -> None:
    accepted = []
    for rope in ropes():
        try:
            accepted.append(RopeParameters.model_validate(rope))
        except ValidationError:
            continue
    assert 100 < len(accepted) < ROPES - 50
    last = torch.tensor([MAX_CONTEXT - 1.0])
    for rope_parameters in accepted:
        for head_dim in (base.config.head_dim, 64, 128, 256):
            inverse_d, factor = frequencies(rope_parameters, head_dim)
            angles = torch.outer(last, inverse_d)
            assert (factor * angles.cos()).isfinite().all(), rope_parameters
    own = [with_rope(adapter, n, rope_parameters) for n, rope_parameters in enumerate(accepted)]
    asked = [request(f"r{n}", [5, 6, 7], a, max_tokens=1) for n, a in enumerate(own)]
    engine = make_engine(base, own)
    got = run(engine, [request("other", [1, 2, 3], max_tokens=200), *asked])
    assert len(got["other"]) == 200
    assert all(len(got[r.request_id]) == 1 for r in asked)


@pytest.mark.parametrize("numbers", [{"factor": 1e308}, {"rope_theta": 5e-324, "factor": 2.0}])
def test_an_adapter_that_was_published_with_such_numbers_fails_to_load(
    base: BaseModel, adapter: TestAdapter, numbers: dict[str, Any]
) -> None:
    """Before they had bounds. Streams of others go on."""
    rope = RopeParameters.model_construct(**{"rope_type": "linear", "rope_theta": 10000.0, **numbers})
    bad = with_rope(adapter, 1, rope)
    engine = make_engine(base, [bad])
    with pytest.raises(IntegrityError, match="RoPE parameters"):
        run(engine, [request("stream", [1, 2, 3], max_tokens=100), request("bad", [5], bad)])
    engine.cancel("bad")
    assert len(run(engine, [])["stream"]) > 0


@pytest.fixture
def api(tmp_path: Path, catalog_url: str, base: BaseModel) -> Iterator[Api]:
    api = Api(tmp_path / "home", catalog_url)
    (api.settings.home / "bases").mkdir(parents=True)
    (api.settings.home / "bases" / base.name).symlink_to(base.path)
    yield api
    api.close()


def upload(api: Api, folder: Path, **fields: Any) -> Callable[[], object]:
    """Publishes the folder with these fields of its `loray.json`."""
    path = folder / "loray.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    client = CatalogClient("http://test", transport=api.transport)
    id = client.begin_upload().id
    for file in sorted(folder.iterdir()):
        client.put_file(id, file)
    return lambda: client.register("tone", upload=id)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"rope_parameters": LINEAR | {"factor": 1e308}}, "factor"),
        ({"rope_parameters": LINEAR | {"rope_type": "yarn", "original_max_position_embeddings": -1}}, "original_max"),
        ({"context_length": 1_000_000_000}, "context_length"),
        ({"context_length": 1 << 40}, "context_length"),
        ({"context_length": 4096}, "a context of 4,096 tokens; its RoPE on .* has at most 512"),
        ({"context_length": 4096, "rope_parameters": LINEAR}, "at most 2,048"),
        ({"context_length": 2048, "original_context_length": 128, "rope_parameters": LINEAR}, "at most 512"),
        ({"evaluations": [{"metric": "m", "value": 1, "dataset": "d", "count": 1 << 40}]}, "count"),
    ],
)
def test_numbers_of_a_manifest_are_computed_and_not_believed(
    api: Api, base: BaseModel, peft_folder: Callable[..., Path], fields: dict[str, Any], reason: str
) -> None:
    folder = peft_folder(base)
    describe(folder, base)
    with pytest.raises(DataError, match=reason):
        upload(api, folder, **fields)()
    assert tuple(api.catalog.snapshot().models()) == ()


def test_a_context_that_its_rope_has_is_published(api: Api, base: BaseModel, peft_folder: Callable[..., Path]) -> None:
    folder, context = peft_folder(base), 4 * base.config.max_position_embeddings
    rope = RopeParameters.model_validate(LINEAR)
    describe(folder, base, ManifestDetails(rope_parameters=rope, context_length=context))
    upload(api, folder)()
    (entry,) = api.catalog.snapshot().models()
    assert entry.name == "tone"


def test_no_context_moves_the_limit_of_bodies_beyond_64_mib(base: BaseModel) -> None:
    """Where the pool is not known to the gateway, nor any limit is set."""
    served = ServedBase(ServeSpec(base=base.name, device="cuda"), base, None, None)  # type: ignore[arg-type]
    assert served._pool_tokens is None
    assert served.max_body_bytes(8192) == 1 << 20
    assert served.max_body_bytes(1 << 30) == 64 << 20
