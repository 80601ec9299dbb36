"""Locations of objects: `file://` and `s3://` URLs, parsed and checked before anything is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl, urlencode, urlsplit

from loray.errors import SettingsError

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REGION = re.compile(r"[a-z0-9-]+")
_OPTIONS = ("endpoint_url", "region", "credentials_file", "kms_key_id")
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")


@dataclass(frozen=True, slots=True)
class FileLocation:
    """`file:///folder`."""

    folder: Path

    @property
    def url(self) -> str:
        return f"file://{self.folder}"

    @property
    def is_local(self) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class S3Location:
    """`s3://bucket/prefix?endpoint_url=…&region=…&credentials_file=…&kms_key_id=…`; every option may be left out.

    endpoint_url      `http://host:port` of a server other than AWS's
    region            default: the region of the AWS configuration
    credentials_file  AWS shared credentials file with static keys in its profile `default`; otherwise the AWS chain:
                      environment, shared files, the role of the pod or the machine
    kms_key_id        KMS key that encrypts the objects (SSE-KMS)
    """

    bucket: str
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    credentials_file: Path | None = None
    kms_key_id: str | None = None

    @property
    def url(self) -> str:
        """The URL that `parse_location` reads."""
        values = {name: getattr(self, name) for name in _OPTIONS}
        query = urlencode({name: value for name, value in values.items() if value is not None}, safe=":/")
        return "/".join(filter(None, (f"s3://{self.bucket}", self.prefix))) + (f"?{query}" if query else "")

    @property
    def is_local(self) -> bool:
        """The server listens on loopback."""
        return is_this_machine(self.endpoint_url or "")


Location = FileLocation | S3Location


def is_this_machine(address: str) -> bool:
    """The URL, or `host:port`, names the loopback interface."""
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    return host is not None and _LOOPBACK.fullmatch(host) is not None


def is_on_loopback(host: str) -> bool:
    """A server that listens at this host is reached from this machine alone."""
    return is_this_machine(f"[{host}]" if ":" in host else host)


def http_url(address: str) -> str:
    """The URL of `host:port`; an address that is a URL already is returned unchanged."""
    return address if "://" in address else f"http://{address}"


def parse_location(url: str) -> Location:
    """Raises SettingsError, which says what is wrong with the URL."""
    scheme, _, rest = url.partition("://")
    if scheme == "file":
        if not rest.startswith("/"):
            raise SettingsError(f"store {url!r} must name an absolute folder: file:///folder")
        return FileLocation(Path(rest))
    if scheme == "s3":
        return _parse_s3(url)
    raise SettingsError(f"store {url!r} must start with file:// or s3://")


def _parse_s3(url: str) -> S3Location:
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SettingsError("an s3:// URL holds no keys: name a credentials_file, or use the AWS_… variables")
    if not _BUCKET.fullmatch(parts.netloc):
        raise SettingsError(
            f"store {url!r}: {parts.netloc!r} is not a bucket's name (3 to 63 lower-case letters, digits, '.' and '-')"
        )
    prefix = parts.path.strip("/")
    if parts.fragment or PurePosixPath(prefix).as_posix() != (prefix or ".") or ".." in prefix.split("/"):
        raise SettingsError(f"store {url!r}: write s3://bucket/prefix, the prefix without '.', '..', '//' and '#'")
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as e:
        raise SettingsError(f"store {url!r}: options are written ?name=value&name=value") from e
    options = dict(pairs)
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise SettingsError(f"store {url!r}: unknown option {', '.join(unknown)}; known are {', '.join(_OPTIONS)}")
    if len(options) != len(pairs) or not all(options.values()):
        raise SettingsError(f"store {url!r}: each option is given once, with a value")
    endpoint, region, file = options.get("endpoint_url"), options.get("region"), options.get("credentials_file")
    if endpoint is not None:
        endpoint = _checked_endpoint(url, endpoint)
    if region is not None and not _REGION.fullmatch(region):
        raise SettingsError(f"store {url!r}: {region!r} is not a region, as us-east-1 is one")
    if file is not None and not file.startswith("/"):
        raise SettingsError(f"store {url!r}: credentials_file must be an absolute path, not {file!r}")
    return S3Location(parts.netloc, prefix, endpoint, region, Path(file) if file else None, options.get("kms_key_id"))


def _checked_endpoint(url: str, endpoint: str) -> str:
    parts = urlsplit(endpoint)
    try:
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    if not is_whole or parts.path.strip("/") or parts.query or "@" in parts.netloc:
        raise SettingsError(f"store {url!r}: endpoint_url must be http://host:port or https://host, not {endpoint!r}")
    return f"{parts.scheme}://{parts.netloc}"
