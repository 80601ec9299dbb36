"""TLS between nodes is what Ray's variables say, and a setting that cannot be is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.encryption import client_context, server_context, uses_tls
from loray.errors import SettingsError
from tests.fixtures.authority import Authority


def test_without_ray_s_there_is_none() -> None:
    for env in ({}, {"RAY_USE_TLS": "0"}, {"RAY_USE_TLS": "", "RAY_TLS_CA_CERT": "/nowhere"}):
        assert not uses_tls(env)
        assert server_context(env) is client_context(env) is None
    for value in ("1", "true", "True"):  # as Ray reads it
        assert uses_tls({"RAY_USE_TLS": value})


def test_what_cannot_be_is_named(tmp_path: Path) -> None:
    env = Authority(tmp_path).node("127.0.0.1")
    for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
        for value in ("", str(tmp_path / "nowhere"), "/dev/null"):
            for context in (server_context, client_context):
                with pytest.raises(SettingsError, match=name):
                    context(env | {name: value})
