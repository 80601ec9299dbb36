"""Checks of the servers: the port that serving needs, the server of LORAY_URL, and TLS between a cluster's nodes."""

from __future__ import annotations

import errno
import socket
import ssl

from loray.cli.doctor.finding import Finding, Situation, error, ok, warning
from loray.errors import ClusterError, LorayError, PermissionDenied, Unauthenticated
from loray.local.processes import check_port
from loray.local.serving import Address, raylets, serving_urls
from loray.locations import http_url

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


def encryption(s: Situation) -> Finding:
    """Asks the nodes themselves: what this process' environment says is not what they run with."""
    if s.settings.address is None:
        return ok("one machine: there is no network between nodes")
    try:
        nodes = raylets(http_url(s.settings.address))
    except ClusterError as e:
        return ok(f"the nodes of LORAY_ADDRESS={s.settings.address} could not be asked for TLS: {e}")
    told = f"the cluster at LORAY_ADDRESS={s.settings.address} has {len(nodes)} nodes"
    if len({node.host for node in nodes}) < 2:
        return ok(f"{told} on one machine")
    speak = [_speaks_tls(node) for node in nodes]
    if False in speak:
        return warning(
            f"{told}, and what goes between them is not encrypted: prompts, answers and adapters",
            "RAY_USE_TLS=1 with RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT on every node, or the "
            "component infra/kuberay/tls",
        )
    if None in speak:
        return ok(f"{told}; whether they use TLS cannot be seen from this machine")
    return ok(f"{told}, with TLS between them")


def _speaks_tls(node: Address) -> bool | None:
    """None where nothing answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whose certificate it is, is not the question
    context.set_alpn_protocols(["h2"])
    try:
        connection = socket.create_connection(node, timeout=_TIMEOUT_S)
    except OSError:
        return None
    with connection:
        try:
            context.wrap_socket(connection).close()
        except ssl.SSLError as e:
            return "ALERT" in (e.reason or "")  # of a server that wants a certificate
        except ConnectionError:
            return False
        except OSError:
            return None
    return True


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
