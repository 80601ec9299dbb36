"""The examples, as they stand in examples/, on a server with the tiny base."""

from __future__ import annotations

import asyncio
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from loray.bases.registry import BaseModel
from tests.conftest import REPOSITORY
from tests.fixtures.cluster import Served

EXAMPLES = REPOSITORY / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(served_alone: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs an example in this process, for a server at `url`, and returns what it printed."""

    def run(name: str, *args: object, url: str = served_alone.url) -> str:
        monkeypatch.setenv("LORAY_URL", url)
        monkeypatch.setenv("MODEL", served_alone.base.name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())  # LiteLLM makes one where there is none, and leaves it open
        yield run
        asyncio.set_event_loop(None)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    data = tmp_path / "my.jsonl"
    data.write_text("".join(f"{json.dumps({'prompt': f'{i}?', 'completion': f'{i}!'})}\n" for i in range(12)))
    return data


def test_structured_output(run: Run) -> None:
    lines = run("structured_output.py")
    assert "ticket: subject=" in lines
    assert lines.splitlines()[-1] in ("mood: good", "mood: bad")


@pytest.mark.parametrize("name", ["openai_tools.py", "langchain_agent.py"])
def test_agents(run: Run, name: str) -> None:
    lines = run(name)
    assert lines.startswith("the model calls add: ")
    assert "\nanswer: " in lines


def test_litellm(run: Run) -> None:
    assert re.search(r"^answer: .*^tokens: \d+$", run("litellm_client.py"), re.MULTILINE | re.DOTALL)


def test_from_a_folder_of_peft_to_a_roll_back(
    run: Run, served_alone: Served, peft_folder: Callable[[BaseModel, str, int], Path]
) -> None:
    for version in (1, 2):
        folder = peft_folder(served_alone.base, "lora", version)
        lines = run("bring_a_peft_adapter.py", folder, "example", served_alone.base.name)
        assert f"published example@{version}: lora, digest " in lines
        assert "\nanswer: " in lines
    shown, moved, refused, back = run("promote_and_roll_back.py", "example").splitlines()
    assert (shown, moved, back) == ("prod is example@1", "prod is example@2", "prod is example@1 again")
    assert refused.startswith("refused: ")


@pytest.mark.slow
def test_sweep(served_alone: Served, rows: Path) -> None:
    env = os.environ | {"LORAY_HOME": str(served_alone.settings.home), "MODEL": served_alone.base.name}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    command = ["bash", str(EXAMPLES / "sweep.sh"), str(rows), "swept", "--dry-run"]
    shown = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert "trial 3: learning_rate=1e-3 rank=16" in shown.stdout, shown.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_train_and_serve(run: Run, served: Served, rows: Path) -> None:
    lines = run("train_and_serve.py", rows, "trained", url=served.url)
    assert "step 20: loss " in lines
    assert "\ntrained@1 says: " in lines
    httpx.delete(f"{served.url}/api/v1/adapters/trained", timeout=30).raise_for_status()


def test_every_example_is_run() -> None:
    """Here, or in a test of its own."""
    tests = (Path(__file__), *(Path(__file__).parents[2] / "examples").glob("test_*.py"))
    text = "".join(path.read_text(encoding="utf-8") for path in tests)
    scripts = [path for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")]
    assert not [path for path in scripts if f'"{path.name}"' not in text and f"examples.{path.stem} import" not in text]
