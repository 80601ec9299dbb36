"""TLS 1.3 of loray's own connections between nodes, with the files that Ray has for its own."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from loray.errors import SettingsError

_CERTIFICATE, _KEY, _AUTHORITY = "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"


def uses_tls(env: Mapping[str, str]) -> bool:
    """Ray's processes with this environment encrypt what they send."""
    return env.get("RAY_USE_TLS", "").lower() in ("1", "true")


def server_context(env: Mapping[str, str]) -> ssl.SSLContext | None:
    """The context of a server, which takes those alone that show a certificate of the authority. None without
    RAY_USE_TLS.

    Raises SettingsError where a file is not named or cannot be used. The files are read now: a renewed certificate
    counts from the next start, as Ray's does.
    """
    return _context(env, ssl.PROTOCOL_TLS_SERVER)


def client_context(env: Mapping[str, str]) -> ssl.SSLContext | None:
    """The context of a client: the other end must show a certificate of the authority that names the address which was
    dialled. Otherwise it is as `server_context`.
    """
    return _context(env, ssl.PROTOCOL_TLS_CLIENT)


def _context(env: Mapping[str, str], protocol: ssl._SSLMethod) -> ssl.SSLContext | None:
    if not uses_tls(env):
        return None
    missing = [name for name in (_CERTIFICATE, _KEY, _AUTHORITY) if not env.get(name)]
    if missing:
        raise SettingsError(f"RAY_USE_TLS is on, and {', '.join(missing)} is not set to a file")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_cert_chain(env[_CERTIFICATE], env[_KEY])
    except OSError as e:
        raise SettingsError(f"{_CERTIFICATE}={env[_CERTIFICATE]} and {_KEY}={env[_KEY]} cannot be used: {e}") from e
    try:
        context.load_verify_locations(env[_AUTHORITY])
    except OSError as e:
        raise SettingsError(f"{_AUTHORITY}={env[_AUTHORITY]} cannot be used: {e}") from e
    return context
