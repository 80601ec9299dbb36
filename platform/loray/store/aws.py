"""AWS's configuration, and the S3 client made from it. boto3 is imported with the first client."""

from __future__ import annotations

import configparser
import os
from pathlib import Path
from typing import Any, NamedTuple

from loray.errors import SettingsError
from loray.locations import S3Location

NUM_CONNECTIONS = 8  # parallel transfers of one object's parts

_PROFILE = "default"
_DEFAULT_REGION = "us-east-1"  # for servers without regions
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 60
_QUICK_READ_TIMEOUT_S = 5
_MAX_ATTEMPTS = 4  # of each request, with growing pauses
_QUICK_MAX_ATTEMPTS = 2


class Keys(NamedTuple):
    access_key: str
    secret_key: str
    session_token: str | None = None


def read_keys(file: Path) -> Keys:
    """The keys of profile `default` in a shared credentials file. Raises SettingsError where there are none."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(file.read_text(encoding="utf-8"), source=str(file))
        profile = parser[_PROFILE]
        return Keys(
            profile["aws_access_key_id"], profile["aws_secret_access_key"], profile.get("aws_session_token") or None
        )
    except OSError as e:
        raise SettingsError(f"the store's credentials_file {file} cannot be read: {e.strerror}") from e
    except (configparser.Error, KeyError, UnicodeDecodeError) as e:
        raise SettingsError(
            f"the store's credentials_file {file} needs a section [{_PROFILE}] with aws_access_key_id and "
            "aws_secret_access_key"
        ) from e


def endpoint_of(location: S3Location) -> str | None:
    """The endpoint of the URL, else of AWS's environment variables. None means AWS itself."""
    return location.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def region_of(location: S3Location) -> str | None:
    """The region of the URL, else of AWS's environment variables. None means AWS's configuration files."""
    region = location.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return region or (_DEFAULT_REGION if endpoint_of(location) else None)


def connect(location: S3Location, *, quick: bool = False) -> Any:
    """A boto3 client, which several threads may use. It retries requests and verifies checksums. Sends nothing yet.

    `quick` is for small objects: a request fails within seconds instead of minutes. Raises SettingsError where the
    credentials file is wrong.
    """
    import boto3
    from botocore.config import Config

    keys = Keys("", "") if location.credentials_file is None else read_keys(location.credentials_file)
    endpoint = endpoint_of(location)
    session = boto3.session.Session(
        aws_access_key_id=keys.access_key or None,
        aws_secret_access_key=keys.secret_key or None,
        aws_session_token=keys.session_token,
        region_name=region_of(location),
    )
    return session.client(
        "s3",
        endpoint_url=endpoint,
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"} if endpoint else None,
            retries={"mode": "standard", "total_max_attempts": _QUICK_MAX_ATTEMPTS if quick else _MAX_ATTEMPTS},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_QUICK_READ_TIMEOUT_S if quick else _READ_TIMEOUT_S,
            max_pool_connections=2 * NUM_CONNECTIONS,
            request_checksum_calculation="when_supported",
            response_checksum_validation="when_supported",
        ),
    )
