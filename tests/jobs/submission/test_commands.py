"""What is submitted to Ray's job server, and what is refused before."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from jobs.rl.driver import main as rl_driver
from jobs.submission import commands
from jobs.submission.commands import Place, Submission, Work, for_server
from jobs.sweeps.driver import main as sweep_driver
from jobs.train import main as train_driver
from loray.errors import DataError, SettingsError, SpecError
from loray.recipes.load import STDIN, Recipe, load_recipe
from loray.settings import Settings
from loray.spec import TrainSpec
from tests.fixtures.recipes import write

ADDRESS = "http://head.example:8265"
REACHABLE = {"LORAY_STORE": "s3://bucket/loray", "LORAY_CATALOG": "postgresql://db/loray"}
INPUT = "loray-input.json"
HERE, THERE = Settings.from_env({}), Settings.from_env(REACHABLE)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    (tmp_path / "stage").mkdir()
    return tmp_path / "stage"


def local(recipe: Recipe, stage: Path, settings: Settings = HERE, **options: bool) -> Submission:
    return Submission.of(Work.training(recipe, **options), Place.at(None, settings, stage))


def remote(recipe: Recipe, stage: Path, settings: Settings = THERE, **options: bool) -> Submission:
    return Submission.of(Work.training(recipe, **options), Place.at(ADDRESS, settings, stage))


def from_server(spec: TrainSpec, settings: Settings, stage: Path, *, resume: bool = False) -> Submission:
    return Submission.of(Work.training(Recipe(spec, None, Path("/")), resume=resume), Place.of_server(settings, stage))


def test_which_addresses_are_remote() -> None:
    def is_remote(address: str) -> bool:
        return Settings.from_env({"LORAY_ADDRESS": address}).is_remote

    assert not any(map(is_remote, ("http://127.0.0.1:8265", "localhost:1", "http://[::1]:1", "")))
    assert all(map(is_remote, (ADDRESS, "10.0.0.1:8265", "ray://head:10001")))


def test_local_jobs_run_in_the_folder_of_the_recipe(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("WANDB_SERVICE", "of this process")
    job = local(write(tmp_path / "my recipes"), stage, settings, resume=True)
    assert shlex.split(job.entrypoint) == [
        *("exec", "<", INPUT, "&&", "cd", str(tmp_path / "my recipes"), "&&"),
        *("exec", sys.executable, "-P", "-m", "jobs.train", "-", "--resume", "--events"),
    ]
    environment = settings.to_env() | {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert job.runtime_env == {"working_dir": str(stage), "env_vars": environment}
    assert [path.name for path in stage.iterdir()] == [INPUT]  # data stays where it is


def test_shipped_recipes_have_their_data_here(tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").touch()
    job = local(load_recipe("lora_smollm2"), stage)
    assert f" cd {tmp_path} " in job.entrypoint


def test_kubernetes_service_variables_are_not_settings() -> None:
    services = ("LORAY_SERVICE_HOST", "LORAY_GATEWAY_SERVICE_PORT_HTTP", "LORAY_PORT", "LORAY_PORT_8000_TCP_ADDR")
    assert Settings.from_env(dict.fromkeys(services, "10.0.0.1")) == HERE
    for name in ("LORAY_STOER", "LORAY_PORTS"):
        with pytest.raises(SettingsError, match=f"unknown environment variable {name}"):
            Settings.from_env({name: "x"})


def test_a_missing_data_file_is_no_job(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
        local(write(tmp_path, data={"train": "none.jsonl"}), tmp_path)


def test_a_remote_cluster_cannot_reach_this_disk(tmp_path: Path) -> None:
    for env in (
        {},
        {"LORAY_STORE": "s3://bucket/loray"},
        {"LORAY_CATALOG": "postgresql://db/loray"},
        REACHABLE | {"LORAY_STORE": "s3://bucket/loray?endpoint_url=http://127.0.0.1:9000"},
        REACHABLE | {"LORAY_CATALOG": "postgresql://localhost:5432/loray"},
    ):
        with pytest.raises(SettingsError, match=r"head\.example:8265 cannot reach this machine"):
            remote(write(tmp_path), tmp_path / "stage", Settings.from_env(env))


def test_remote_jobs_upload_the_recipe_and_its_data(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path / "a", data={"train": "data.jsonl", "eval": "s3://bucket/eval.jsonl"})
    (tmp_path / "a" / "large-and-unrelated.bin").touch()
    job = remote(recipe, stage)
    assert sorted(p.name for p in stage.iterdir()) == ["data.jsonl", INPUT]
    assert given_to(job, monkeypatch) == recipe.spec  # with paths that start in that folder
    assert job.entrypoint == f"exec < {INPUT} && exec python -P -m jobs.train - --events"
    assert job.runtime_env["working_dir"] == str(stage)
    assert job.runtime_env["env_vars"] == REACHABLE | {"LORAY_LOG_LEVEL": "INFO"}


def test_a_sweep_uploads_its_plan_and_to_another_cluster_its_data(tmp_path: Path, stage: Path) -> None:
    recipe, here = write(tmp_path / "a"), Settings.from_env({"LORAY_HOME": str(tmp_path)})
    near = Submission.of(Work.sweep(recipe, "{}"), Place.at(None, here, stage))
    assert [p.name for p in stage.iterdir()] == [INPUT]
    driver = ["exec", sys.executable, "-P", "-m", "jobs.sweeps.driver", "-", "--events"]
    assert shlex.split(near.entrypoint)[-7:] == driver
    assert near.runtime_env["working_dir"] == str(stage)
    far = Submission.of(Work.sweep(recipe, "{}"), Place.at(ADDRESS, THERE, stage))
    assert sorted(p.name for p in stage.iterdir()) == ["data.jsonl", INPUT]
    assert far.runtime_env["env_vars"] == REACHABLE | {"LORAY_LOG_LEVEL": "INFO"}
    resumed = Submission.of(Work.resumed_sweep("arithmetic"), Place.at(ADDRESS, THERE, stage))
    assert resumed.entrypoint == "exec python -P -m jobs.sweeps.driver --resume arithmetic --events"
    with pytest.raises(SettingsError, match="cannot reach this machine"):
        Place.at(ADDRESS, here, stage)


def test_no_plan_is_passed_to_the_driver(tmp_path: Path, stage: Path) -> None:
    recipe = write(tmp_path / "a")
    for parser, work in (
        (train_driver, Work.training(recipe, resume=True, no_plan=True)),
        (sweep_driver, Work.sweep(recipe, "{}", no_plan=True)),
        (sweep_driver, Work.resumed_sweep("arithmetic", no_plan=True)),
    ):
        words = shlex.split(Submission.of(work, Place.at(ADDRESS, THERE, stage)).entrypoint)
        assert parser.make_context("driver", words[words.index("-m") + 2 :]).params["no_plan"] is True


def test_no_secret_of_this_machine_is_sent(tmp_path: Path, stage: Path) -> None:
    options = "endpoint_url=https://s3.example&region=eu-west-1"
    store = f"s3://bucket/loray?{options}&credentials_file={tmp_path}/keys"
    settings = Settings.from_env({"LORAY_STORE": store, "LORAY_CATALOG": "postgresql://loray:hush@db/loray"})
    job = remote(write(tmp_path), stage, settings, resume=True)
    assert job.runtime_env["env_vars"] == {"LORAY_STORE": f"s3://bucket/loray?{options}", "LORAY_LOG_LEVEL": "INFO"}
    assert "hush" not in str(job)
    command = job.entrypoint.replace("python", "echo python")
    run = partial(subprocess.run, command, shell=True, cwd=stage, capture_output=True, text=True)
    with_catalog = run(env={"LORAY_CATALOG": "x", "PATH": os.environ["PATH"]})
    assert with_catalog.stdout.split() == ["python", "-P", "-m", "jobs.train", "-", "--resume", "--events"]
    without = run(env={"PATH": os.environ["PATH"]})
    assert (without.returncode != 0, without.stdout) == (True, "")
    assert "LORAY_CATALOG: must be set on the nodes of the cluster" in without.stderr


def given_to(driver: Submission, monkeypatch: pytest.MonkeyPatch) -> TrainSpec:
    """The recipe that the driver of a job reads, whose command a shell runs in the folder that was uploaded."""
    shown = shlex.split(driver.entrypoint)
    assert shown[shown.index("jobs.train") + 1] == STDIN
    read = re.sub(rf"exec ({re.escape(sys.executable)}|python) -P .*", "cat", driver.entrypoint)
    folder = driver.runtime_env["working_dir"]
    done = subprocess.run(read, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    monkeypatch.setattr("sys.stdin", io.StringIO(done.stdout))
    return load_recipe(STDIN).spec


def test_a_recipe_needs_no_file(tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path, data={"train": "s3://bucket/it's.jsonl", "eval": "/shared/eval.jsonl"}).spec
    for settings in (Settings.from_env({"LORAY_HOME": str(tmp_path)}), THERE):
        job = from_server(spec, settings, stage, resume=True)
        command = ["exec", sys.executable, "-P", "-m", "jobs.train", "-", "--resume", "--events"]
        assert shlex.split(job.entrypoint) == ["exec", "<", INPUT, "&&", *command]
        assert given_to(job, monkeypatch) == spec
        assert job.runtime_env == {"working_dir": str(stage), "env_vars": settings.to_env()}
        assert job.metadata == {"loray_name": "arithmetic", "loray_method": "lora"}


def test_a_recipe_of_200_kib_fits_every_command(tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux passes at most 128 KiB in one argument."""
    paths = [f"s3://bucket/{'part-of-the-data' * 8}/{i:04}.jsonl" for i in range(1400)]
    recipe = write(tmp_path / "a", data={"train": paths})._replace(path=None)
    assert len(recipe.spec.model_dump_json()) > 200 << 10
    for job in (from_server(recipe.spec, THERE, stage), local(recipe, stage, THERE), remote(recipe, stage)):
        assert len(job.entrypoint) < 1000
        assert given_to(job, monkeypatch) == recipe.spec


def test_standard_input_is_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("name: a\n"))
    with pytest.raises(SpecError, match="the recipe on standard input is no JSON object"):
        load_recipe(STDIN)


def test_a_submitted_recipe_must_not_name_relative_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'data\.jsonl' is a relative path"):
        from_server(write(tmp_path).spec, HERE, tmp_path)


def test_a_password_stays_in_the_environment_of_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = write(tmp_path, data={"train": "s3://bucket/train.jsonl"}).spec
    settings = Settings.from_env(REACHABLE | {"LORAY_CATALOG": "postgresql://db/loray?user=loray&password=hush"})
    monkeypatch.setattr(commands, "current_cluster", lambda home: None)
    elsewhere = from_server(spec, settings, tmp_path)
    assert "hush" not in str(elsewhere)
    assert "LORAY_CATALOG" in elsewhere.entrypoint
    monkeypatch.setattr(commands, "current_cluster", lambda home: "a cluster of this home, whose dashboard is private")
    here = from_server(spec, settings, tmp_path)
    assert here.runtime_env == {"working_dir": str(tmp_path), "env_vars": settings.to_env()}


def test_absolute_paths_are_refused_for_remote_jobs(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (str(tmp_path / "a" / "data.jsonl"), "~/a/data.jsonl"):
        recipe = write(tmp_path / "a", data={"train": source})
        with pytest.raises(DataError, match=r"write it relative to the recipe, as data\.jsonl$"):
            remote(recipe, stage)


def test_data_elsewhere_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").touch()
    recipe = write(tmp_path / "a", data={"train": "../data.jsonl"})
    with pytest.raises(DataError, match="lies outside"):
        remote(recipe, tmp_path)


def test_a_server_gets_the_whole_recipe_and_data_that_it_can_open(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    assert for_server(recipe, "http://127.0.0.1:8000").data.train == str(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="is a file of this machine, and the cluster of "):
        for_server(recipe, "http://head.example:8000")
    far = write(tmp_path, data={"train": "s3://bucket/train.jsonl"})
    assert for_server(far, "http://head.example:8000") == far.spec


def test_values_on_top_of_a_file_are_part_of_the_job(
    tmp_path: Path, stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a")
    recipe = load_recipe(str(tmp_path / "a" / "recipe.yaml"), over={"seed": 7})
    for job in (local(recipe, stage), remote(recipe, stage)):
        assert given_to(job, monkeypatch) == recipe.spec


def test_rewards_have_a_driver_of_their_own_and_their_module_beside_them(tmp_path: Path, stage: Path) -> None:
    reward = {"type": "rl", "reward": {"function": "rewards.mine:short"}}
    recipe = write(tmp_path / "a", objective=reward)
    (tmp_path / "a" / "rewards" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a" / "rewards" / "mine.py").touch()
    words = shlex.split(remote(recipe, stage, resume=True).entrypoint)
    driver = words[words.index("-m") + 1 :]
    assert driver == ["jobs.rl.driver", "-", "--resume", "--events"]
    assert rl_driver.make_context("driver", driver[1:]).params["resume"] is True
    assert [path.name for path in (stage / "rewards").iterdir()] == ["mine.py"]
    local(recipe, tmp_path)
    assert not (tmp_path / "rewards").exists()  # it is where it was
    (tmp_path / "a" / "short.py").touch()
    remote(write(tmp_path / "a", objective={"type": "rl", "environment": "short:Episode"}), stage)
    assert (stage / "short.py").is_file()
