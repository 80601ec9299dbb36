"""An S3 server that does what one policy allows: a proxy that asks the policy about each request, as AWS's IAM does."""

from __future__ import annotations

import fnmatch
import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

from loray.locations import S3Location
from tests.conftest import REPOSITORY

POLICIES = REPOSITORY / "infra" / "policies"
_REFUSED = b"<Error><Code>AccessDenied</Code><Message>the policy does not allow it</Message></Error>"
_OF_ONE_CONNECTION = {"connection", "transfer-encoding", "expect"}


class Asked(NamedTuple):
    """One permission that a request needs. `prefix`: of a listing; empty for all of the bucket."""

    action: str
    resource: str
    prefix: str = ""


def asked(method: str, target: str, body: bytes) -> list[Asked]:
    """What a request needs, see AWS's table of S3's operations."""
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
    if key:
        if method == "DELETE":
            action = "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"
            return [Asked(action, f"{bucket}/{key}")]
        return [Asked("s3:GetObject" if method in ("GET", "HEAD") else "s3:PutObject", f"{bucket}/{key}")]
    if method == "POST" and "delete" in query:
        keys = [e.text for e in ElementTree.fromstring(body).iter() if e.tag.rpartition("}")[2] == "Key"]
        return [Asked("s3:DeleteObject", f"{bucket}/{name}") for name in keys]
    if method in ("GET", "HEAD"):
        return [Asked("s3:ListBucket", bucket, query.get("prefix", [""])[0])]
    return [Asked(f"s3:{method.title()}Bucket", bucket)]


class Policy:
    """A policy of `infra/policies` for one store, and for a tenant's data in a folder of the same bucket."""

    def __init__(self, role: str, location: S3Location, *, tenant: str = "default") -> None:
        text = (POLICIES / f"{role}.json").read_text()
        for name, value in (
            ("DATA_BUCKET", location.bucket),
            ("DATA_PREFIX", "data"),
            ("BUCKET", location.bucket),
            ("PREFIX", location.prefix),
            ("TENANT", tenant),
        ):
            text = text.replace(name, value)
        self._statements: list[dict[str, Any]] = json.loads(text)["Statement"]

    @property
    def actions(self) -> set[str]:
        return {action for statement in self._statements for action in statement["Action"]}

    def allows(self, one: Asked) -> bool:
        return any(_grants(statement, one) for statement in self._statements)


def _grants(statement: Mapping[str, Any], one: Asked) -> bool:
    assert statement.keys() <= {"Sid", "Effect", "Action", "Resource", "Condition"}
    assert statement["Effect"] == "Allow"
    resource = f"arn:aws:s3:::{one.resource}"
    if one.action not in statement["Action"] or not _matches(resource, statement["Resource"]):
        return False
    condition = statement.get("Condition")
    if condition is None:
        return True
    assert condition.keys() == {"StringLike"}
    assert condition["StringLike"].keys() == {"s3:prefix"}
    return _matches(one.prefix, condition["StringLike"]["s3:prefix"])


def _matches(value: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns)


class PolicyServer:
    """`location` is that of the store behind it, with this server's address."""

    def __init__(self, behind: S3Location) -> None:
        upstream = urlsplit(behind.endpoint_url or "")
        assert upstream.hostname is not None
        assert upstream.port is not None
        self._upstream = upstream.hostname, upstream.port
        self._policies: list[Policy] = []
        self.asked: set[Asked] = set()
        self.refused: set[Asked] = set()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                proxy._answer(self)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.location = replace(behind, endpoint_url=f"http://127.0.0.1:{self._server.server_port}")

    @contextmanager
    def role(self, name: str, *others: str) -> Iterator[Policy]:
        """Within the block, requests are those of this role, or of others too; outside, everything is allowed."""
        self.asked, self.refused = set(), set()
        self._policies = [Policy(one, self.location) for one in (name, *others)]
        try:
            yield self._policies[0]
        finally:
            self._policies = []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = _body(handler)
        policies, needed = self._policies, asked(handler.command, handler.path, body)
        if policies:
            self.asked.update(needed)
            refused = {one for one in needed if not any(policy.allows(one) for policy in policies)}
            # pyarrow asks for a bucket that nobody has, to learn from the answer what server it is
            self.refused |= {one for one in refused if one.resource.startswith(self.location.bucket)}
            if refused:
                return _send(handler, 403, {"Content-Type": "application/xml"}, _REFUSED)
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in _OF_ONE_CONNECTION | {"content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            _send(handler, response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """Of a known length, or in chunks."""
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    body = b""
    while size := int(handler.rfile.readline().partition(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    while handler.rfile.readline().strip():  # trailers of HTTP, which AWS's clients do not send
        pass
    return body


def _send(handler: BaseHTTPRequestHandler, status: int, headers: Mapping[str, str], body: bytes) -> None:
    handler.send_response_only(status)
    for name, value in headers.items():
        if name.lower() not in _OF_ONE_CONNECTION and name.lower() != "content-length":
            handler.send_header(name, value)
    of_head = {k.lower(): v for k, v in headers.items()}.get("content-length", "0")
    handler.send_header("Content-Length", of_head if handler.command == "HEAD" else str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
