"""What goes to Ray's job server, and what is refused before."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from jobs import submission
from jobs.recipe import load_recipe
from loray.errors import DataError, SettingsError
from loray.settings import Settings
from tests.jobs.test_recipe import write

ADDRESS = "http://head.example:8265"
REACHABLE = {"LORAY_STORE": "s3://bucket/loray", "LORAY_CATALOG": "postgresql://db/loray"}


def test_which_addresses_are_remote() -> None:
    assert [submission.is_remote(a) for a in ("http://127.0.0.1:8265", "localhost:1", "http://[::1]:1")] == [False] * 3
    assert [submission.is_remote(a) for a in (ADDRESS, "10.0.0.1:8265", "ray://head:10001")] == [True] * 3


def test_local_jobs_get_absolute_paths_and_no_upload(tmp_path: Path) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    job = submission.local(write(tmp_path / "my recipes"), settings, resume=True)
    assert shlex.split(job.entrypoint) == [
        *("cd", str(tmp_path / "my recipes"), "&&", "exec", sys.executable, "-P", "-m", "jobs.train"),
        *(str(tmp_path / "my recipes" / "recipe.yaml"), "--events", "--resume"),
    ]
    assert job.runtime_env == {"env_vars": settings.to_env()}


def test_shipped_recipes_keep_their_paths_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    job = submission.local(load_recipe("lora_smollm2"), Settings.from_env({}), resume=False)
    assert shlex.split(job.entrypoint)[:2] == ["cd", str(tmp_path)]
    assert shlex.split(job.entrypoint)[-2:] == ["lora_smollm2", "--events"]


def test_what_kubernetes_says_of_services_is_no_setting() -> None:
    services = ("LORAY_SERVICE_HOST", "LORAY_GATEWAY_SERVICE_PORT_HTTP", "LORAY_PORT", "LORAY_PORT_8000_TCP_ADDR")
    assert Settings.from_env(dict.fromkeys(services, "10.0.0.1")) == Settings.from_env({})
    for name in ("LORAY_STOER", "LORAY_PORTS"):
        with pytest.raises(SettingsError, match=f"unknown environment variable {name}"):
            Settings.from_env({name: "x"})


def test_a_missing_data_file_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        submission.local(write(tmp_path, data={"train": "none.jsonl"}), Settings.from_env({}), resume=False)


def test_a_remote_cluster_cannot_reach_this_disk(tmp_path: Path) -> None:
    for env in ({}, {"LORAY_STORE": "s3://bucket/loray"}, {"LORAY_CATALOG": "postgresql://db/loray"}):
        with pytest.raises(SettingsError, match="s3://, which this version does not have yet"):
            submission.remote(
                write(tmp_path), Settings.from_env(env), address=ADDRESS, resume=False, stage=tmp_path / "stage"
            )


def test_remote_jobs_take_the_recipe_and_its_data_along(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    recipe = write(tmp_path / "a", data={"train": "data.jsonl", "eval": "s3://bucket/eval.jsonl"})
    (tmp_path / "a" / "large-and-unrelated.bin").touch()
    job = submission.remote(recipe, Settings.from_env(REACHABLE), address=ADDRESS, resume=False, stage=stage)
    assert sorted(p.name for p in stage.iterdir()) == ["data.jsonl", "recipe.yaml"]
    assert load_recipe(str(stage / "recipe.yaml")).data().train == str(stage / "data.jsonl")
    assert job.entrypoint == "python -P -m jobs.train recipe.yaml --events"
    assert job.runtime_env["working_dir"] == str(stage)
    assert job.runtime_env["env_vars"] == REACHABLE | {"LORAY_LOG_LEVEL": "INFO"}


def test_data_elsewhere_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    recipe = write(tmp_path / "a", data={"train": "../data.jsonl"})
    with pytest.raises(DataError, match="lies outside"):
        submission.remote(recipe, Settings.from_env(REACHABLE), address=ADDRESS, resume=False, stage=tmp_path)
