"""`loray logs, open, completion`, and where a deployment is found."""

from __future__ import annotations

import subprocess
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import click
import pytest

from loray.catalog import Catalog
from loray.cli import logs
from loray.cli.connect import complete_models
from loray.cli.logs import following, last_lines, output_of, ray_files
from loray.errors import ClusterError, NotFoundError
from loray.local.cluster import LocalCluster
from loray.local.serving import announced, serve_details, serving_urls, standalone_servers
from loray.settings import Settings
from tests.cli.run import Loray
from tests.fixtures.calls import refused
from tests.fixtures.versions import publish


def completed(incomplete: str) -> list[str]:
    return complete_models(click.Context(click.Command("c")), click.Argument(["m"]), incomplete)


def test_open(loray: Loray, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loray("open", "--print").code == 1
    with announced(home, "http://127.0.0.1:7000"):
        assert loray("open", "--print").out == "http://127.0.0.1:7000/console\n"
        assert loray("open", "metrics", "--print").out == "http://127.0.0.1:7000/metrics\n"
        assert loray("open", "--json").json == {"url": "http://127.0.0.1:7000/console"}
        monkeypatch.setenv("LORAY_URL", "http://server:1/")
        assert loray("open", "docs", "--print").out == "http://server:1/docs\n"
    opened: list[str] = []
    monkeypatch.setattr(click, "launch", lambda url: opened.append(url) or 1)
    assert "no browser was found" in loray("open", "--url", "http://other/v1").err
    assert opened == ["http://other/console"]


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef loray"), ("fish", "complete ")])
def test_completion_scripts(shell: str, word: str, loray: Loray) -> None:
    script = loray("completion", shell).out
    assert word in script
    assert "_LORAY_COMPLETE" in script


def test_names_of_adapters_are_completed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completed("") == []
    assert not home.exists()
    catalog = Catalog(Settings.from_env().catalog)
    publish(catalog, "tone", 1, aliases=("prod",))
    publish(catalog, "dates", 2)
    catalog.close()
    assert completed("to") == ["tone"]
    assert completed("") == ["dates", "tone"]
    assert completed("tone@") == ["tone@prod"]
    assert completed("nothing@") == []
    monkeypatch.setenv("LORAY_URL", "http://127.0.0.1:1")
    assert completed("to") == []


def cluster_of(folder: Path) -> LocalCluster:
    (folder / "token").write_text("t")
    places = {"temp_dir": str(folder), "token_file": str(folder / "token"), "log_file": str(folder / "cluster.log")}
    return LocalCluster(pid=1, started=1, scope="", address="http://127.0.0.1:1", gcs_address="", **places)


def test_logs_of_rays_session(loray: Loray, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "session_latest" / "logs"
    (folder / "serve").mkdir(parents=True)
    (folder / "serve" / "replica.log").write_text("serve says\n")
    (folder / "worker-w1-01-7.err").write_text(":job_id:01\none\n:actor_name:E\ntwo\n:task_name:f\nthree\n")
    (folder / "serve" / "controller.log").write_text("scaled\n")
    (tmp_path / "cluster.log").write_text("started\n")
    replica = {"log_file_path": "/serve/replica.log", "worker_id": "w1"}
    details: dict[str, Any] = {
        "controller_info": {"log_file_path": "/serve/controller.log", "worker_id": None},
        "applications": {
            "loray": {"deployments": {"engine-tiny": {"replicas": [replica]}, "gateway": {"replicas": []}}}
        },
    }
    cluster = cluster_of(tmp_path)
    assert [f.name for f in ray_files(cluster, details, "replica")] == ["replica.log", "worker-w1-01-7.err"]
    monkeypatch.setattr(logs, "current_cluster", lambda home: cluster)
    monkeypatch.setattr(logs, "serve_details", lambda cluster: details)
    assert loray("logs", "-n", 2).out.splitlines() == [
        "==> replica.log",
        "serve says",
        "==> worker-w1-01-7.err",
        "two",
        "three",
    ]
    assert loray("logs", "controller").out == "scaled\n"
    assert loray("logs", "cluster").out == "started\n"
    assert "the gateway has no log yet" in loray("logs", "gateway").err


def test_logs_of_one_process(loray: Loray, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.log"
    with file.open("w") as out:
        process = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stderr=out)
        try:
            with announced(home, "http://u"):
                (server,) = standalone_servers(home)
                assert output_of(replace(server, pid=process.pid)) == file
        finally:
            process.communicate()
    refused(NotFoundError, "cannot be seen", output_of, replace(server, pid=process.pid))
    assert "nothing is being served" in loray("logs").err
    assert loray("logs", "nothing").code == 2
    assert "loray jobs ls" in loray("logs", "job").err
    assert "nobody" in loray("logs", "job", "nobody").err


def test_ends_of_files_and_what_follows(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("a\nb\n")
    two.write_text("c\n")
    assert list(last_lines([one], 1)) == ["b"]
    assert list(last_lines([one], 0)) == []
    assert list(last_lines([one, two], 9)) == ["==> one", "a", "b", "==> two", "c"]
    with one.open("a") as file:
        file.write("x\n")  # before it is followed
        file.flush()
        lines = following([one], poll_s=0.001)

        def write() -> None:
            file.write("d\n:task_name:f\nhal")
            file.flush()
            file.write("f\n")
            file.flush()

        timer = threading.Timer(0.05, write)
        timer.start()
        assert list(islice(lines, 2)) == ["d", "half"]
        timer.join()
    lines.close()


def test_where_it_is_served(home: Path, tmp_path: Path) -> None:
    settings = Settings.from_env()
    assert serving_urls(settings) == []
    with announced(home, "http://u"):
        assert serving_urls(settings) == ["http://u"]
    refused(ClusterError, "loray down", serve_details, cluster_of(tmp_path))
