"""Checks of the servers: the port that serving needs, and the server of LORAY_URL."""

from __future__ import annotations

import errno

from loray.cli.doctor.finding import Finding, Situation, error, ok
from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.local.processes import check_port
from loray.local.serving import Address, serving_urls

_TIMEOUT_S = 10.0


def port(s: Situation) -> Finding:
    host, number = s.spec.host, s.spec.port
    try:
        check_port(host, number)
        return ok(f"port {number} is free")
    except OSError as e:
        reason = e
    try:
        ours = serving_urls(s.settings)
    except LorayError as e:
        return error(str(e), "loray down")
    if Address(host, number).url in ours:
        return ok(f"loray serves at port {number}")
    mend = f"loray up --port {number + 1}" if s.file is None else f"loray up --spec {s.file} --port {number + 1}"
    if reason.errno != errno.EADDRINUSE:
        return error(f"nothing can listen at {host}:{number}: {reason.strerror}", mend)
    return error(f"port {number} is taken by {_holder(number)}", mend)


def server(s: Situation) -> Finding:
    url = s.settings.url
    if url is None:
        return ok("LORAY_URL is not set: commands work on this machine")
    from loray.client import LorayClient

    try:
        with LorayClient(url, timeout=_TIMEOUT_S) as client:
            names = [model.id for model in client.models()]
    except (Unauthenticated, PermissionDenied) as e:
        given = "is refused" if s.settings.api_key else "is missing"
        return error(
            f"the server at LORAY_URL={url} answers, and the API key {given}: {e}",
            "export LORAY_API_KEY=KEY  (an administrator makes one with `loray keys create`)",
        )
    except LorayError as e:
        return error(f"LORAY_URL={url}: {e}", "export LORAY_URL=http://HOST:PORT of a server, or unset LORAY_URL")
    return ok(f"the server at {url} answers: {len(names)} models")


def _holder(number: int) -> str:
    import psutil

    try:
        pids = {
            c.pid for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == number and c.status == "LISTEN"
        }
        (pid,) = pids - {None}
        return f"process {pid} ({psutil.Process(pid).name()})"
    except (psutil.Error, ValueError, OSError):  # another user's, or it has ended
        return "another program"
