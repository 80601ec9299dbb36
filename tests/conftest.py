"""Fixtures that every area shares: the real base model, tiny random ones, ranks over gloo."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from loray import priority
from loray.bases.registry import BaseModel, add_base

if TYPE_CHECKING:
    from tests.fixtures.ranks import Ranks

pytest_plugins = [
    "tests.fixtures.tiny_bases",
    "tests.fixtures.catalogs",
    "tests.fixtures.cluster",
    "tests.fixtures.postgres",
    "tests.fixtures.s3",
    "tests.fixtures.standalone",
    "tests.fixtures.stores",
    "tests.fixtures.trained",
]

# An example may take as long as a busy machine makes it: no test is about time. The examples are the same in each run.
settings.register_profile("loray", deadline=None, derandomize=True)
settings.load_profile("loray")

# An engine in a test's process has the test's priority: in the background it would wait for all that runs beside, for
# minutes. Before others import it.
compute_in_background = priority.compute_in_background
pytest.MonkeyPatch().setattr(priority, "compute_in_background", lambda process=None: None)

REPOSITORY = Path(__file__).resolve().parent.parent

# Without this the collector looks through all that was imported each time it has grown by a quarter. Tests make many
# objects that live for one of them: looking less often takes a twelfth less CPU.
gc.disable()
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def smollm2_home() -> Path:
    """A LORAY_HOME that outlives the run and holds only the real base model. Tests write elsewhere."""
    return REPOSITORY / ".cache" / "loray-home"


@pytest.fixture(scope="session")
def smollm2(smollm2_home: Path) -> BaseModel:
    """SmolLM2-135M-Instruct, made at the first run and verified at later ones."""
    return add_base("smollm2", home=smollm2_home)


@pytest.fixture(scope="session")
def peft_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`peft_folder(base, "vera", seed=1)`: a fresh copy of a folder that PEFT saved, made once per set of arguments."""
    made: dict[tuple[str, str, int], Path] = {}

    def make(base: BaseModel, method: str = "lora", seed: int = 0) -> Path:
        from peft import LoraConfig, VeraConfig

        from tests.fixtures.peft_adapters import make_adapter

        key = (base.fingerprint, method, seed)
        if key not in made:
            modules = ["q_proj", "v_proj"]
            config = VeraConfig(r=16, target_modules=modules, save_projection=False)
            if method == "lora":
                config = LoraConfig(r=4, lora_alpha=8, target_modules=modules)
            made[key] = tmp_path_factory.mktemp("peft") / f"{method}-{seed}"
            make_adapter(base, made[key], config, seed=seed)
        copy = tmp_path_factory.mktemp("adapter") / made[key].name
        shutil.copytree(made[key], copy)
        config_file = copy / "adapter_config.json"  # of the same base, which may lie elsewhere by now
        saved = json.loads(config_file.read_text()) | {"base_model_name_or_path": str(base.path)}
        config_file.write_text(json.dumps(saved))
        return copy

    return make


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    from tests.fixtures.ranks import Ranks

    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.stop()
