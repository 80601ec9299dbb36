"""Both servers, for tests of what an HTTP client sees: `loray serve`, and `loray up` on the session's Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import openai
import pytest

from loray.catalog import AdapterVersion
from loray.publishing import Destination, publish
from tests.engine.adapters import make_adapter
from tests.fixtures.cluster import Served


@pytest.fixture(
    scope="session",
    params=["served_alone", pytest.param("served", marks=pytest.mark.cluster)],
    ids=["serve", "up"],
)
def server(request: pytest.FixtureRequest) -> Served:
    served: Served = request.getfixturevalue(request.param)
    return served


@pytest.fixture(scope="session")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        yield client


@pytest.fixture(scope="session")
def publish_lora(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], AdapterVersion]:
    from peft import LoraConfig

    def make(name: str, seed: int) -> AdapterVersion:
        folder = tmp_path_factory.mktemp("adapter") / name
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        make_adapter(server.base, folder, config, seed=seed, std=0.3)
        return publish(folder, server.base, Destination(name, server.store, server.catalog))

    return make


@pytest.fixture(scope="session")
def tone(publish_lora: Callable[[str, int], AdapterVersion]) -> list[AdapterVersion]:
    return [publish_lora("tone", seed) for seed in (1, 2, 3)]
