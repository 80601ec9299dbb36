"""Options of the command over a file's, and a server that others reach, which does not start without a key."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from loray.catalog import Catalog
from loray.cli.main import cli
from loray.errors import SettingsError, SpecError
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps.deployment import serve_config
from serve_apps.options import check_keys, read_spec

KEY = "sk-lr-" + "x" * 43


def settings(home: Path, **variables: str) -> Settings:
    return Settings.from_env({"LORAY_HOME": str(home)} | variables)


@pytest.mark.parametrize("command", ["serve", "up"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3"])
def test_it_says_how_the_first_key_is_made(
    command: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LORAY_STORE", "LORAY_CATALOG", "LORAY_ADDRESS", "LORAY_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LORAY_HOME", str(tmp_path))
    refused = CliRunner().invoke(cli, [command, "--host", host])
    assert isinstance(refused.exception, SettingsError)
    assert "loray keys create --scope admin" in str(refused.exception)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_none(host: str, tmp_path: Path) -> None:
    check_keys(host, settings(tmp_path))


def test_a_key_of_the_catalog_or_of_the_deployment_is_enough(tmp_path: Path) -> None:
    spec = ServeSpec(host="0.0.0.0")
    check_keys(spec, settings(tmp_path, LORAY_API_KEY=KEY))
    check_keys(spec, settings(tmp_path, LORAY_API_KEYS_SHA256="0" * 64))
    catalog = Catalog(settings(tmp_path).catalog)
    key = catalog.keys.create("admin", scopes=("admin",)).key
    check_keys(spec, settings(tmp_path))
    catalog.keys.revoke(key.id)
    with pytest.raises(SettingsError):
        check_keys(spec, settings(tmp_path))


def test_servers_are_given_hashes_and_never_keys(tmp_path: Path) -> None:
    given = settings(tmp_path, LORAY_API_KEY=KEY, LORAY_METRICS_KEYS_SHA256="1" * 64, LORAY_KEY_MAX_AGE_S="60")
    config = serve_config(FleetSpec.of(ServeSpec(host="0.0.0.0")), given)
    assert KEY not in repr(config) + repr(given)
    for application in config["applications"]:
        env = application["runtime_env"]["env_vars"]
        assert Settings.from_env(env).key_hashes == given.static_key_hashes
        assert Settings.from_env(env).metrics_key_hashes == ("1" * 64,)
        assert Settings.from_env(env).key_max_age_s == 60
    assert config["applications"][1]["args"] == {"host": "0.0.0.0", "port": 8000}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"LORAY_API_KEYS_SHA256": KEY}, "SHA-256"),
        ({"LORAY_METRICS_KEYS_SHA256": "0" * 63}, "SHA-256"),
        ({"LORAY_API_KEY": "token-abc123"}, "--static"),
    ],
)
def test_wrong_keys_of_a_deployment(tmp_path: Path, variables: dict[str, str], said: str) -> None:
    with pytest.raises(SettingsError, match=said) as refused:
        check_keys("0.0.0.0", settings(tmp_path, **variables))
    assert KEY not in str(refused.value)


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("base: mine\nport: 9000\npool_bytes: 1MiB\n")
    (spec,) = read_spec(file, {"port": 9001, "pool_bytes": "2MiB"}).bases
    assert (spec.base, spec.port, spec.pool_bytes) == ("mine", 9001, 2 << 20)
    file.write_text("pool: 1\n")
    with pytest.raises(SpecError, match=r"pool: .*known fields: .*pool_bytes"):
        read_spec(file, {})


def test_options_of_one_base_are_refused_beside_several(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("port: 9000\nbases: [{base: a}, {base: b, max_num_seqs: 3}]\n")
    fleet = read_spec(file, {"port": 9001, "num_gateways": 2, "base": None})
    assert (fleet.names, fleet.port, fleet.num_gateways) == (("a", "b"), 9001, 2)
    assert [spec.max_num_seqs for spec in fleet.bases] == [32, 3]
    with pytest.raises(SpecError, match="leave out --max-replicas, --pool-bytes"):
        read_spec(file, {"pool_bytes": "1MiB", "max_replicas": 2})
    file.write_text("bases: [{base: a}, {base: a}]\n")
    with pytest.raises(SpecError, match="the same base twice: a"):
        read_spec(file, {})


def test_bounds_make_the_number_of_replicas_follow_demand(tmp_path: Path) -> None:
    assert read_spec(None, {"num_replicas": 2}).bases[0].autoscaling is None
    (spec,) = read_spec(None, {"max_replicas": 3}).bases
    assert (spec.min_replicas, spec.max_replicas, spec.num_replicas) == (1, 3, 1)
    file = tmp_path / "spec.yaml"
    file.write_text("autoscaling: {min_replicas: 2, max_replicas: 6, window_s: 30}\n")
    scaling = read_spec(file, {"max_replicas": 3}).bases[0].autoscaling
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.window_s) == (2, 3, 30)
    with pytest.raises(SpecError, match="max_replicas must be at least min_replicas"):
        read_spec(None, {"min_replicas": 3, "max_replicas": 2})


def test_fields_of_the_file_count_as_set(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("port: 9000\n")
    assert read_spec(file, {"base": "tiny"}).fields_set == {"port"}
    assert read_spec(None, {"base": "tiny"}).fields_set == set()
