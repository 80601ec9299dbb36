"""Errors of S3 and botocore as loray's errors, with messages that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loray.errors import LorayError, StoreError, UnsupportedError
from loray.locations import S3Location
from loray.store.aws import endpoint_of

_REFUSED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
    "403",
}
_ELSEWHERE = {"PermanentRedirect", "AuthorizationHeaderMalformed", "301"}


def status_of(error: Any) -> int:
    """The HTTP status of a botocore ClientError."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def was_retried(error: Any) -> bool:
    """Whether the request was sent more than once, so that an earlier attempt may have succeeded."""
    return bool(error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0))


@contextmanager
def translate_errors(location: S3Location) -> Iterator[None]:
    """Errors of boto3 in the block become StoreError, or UnsupportedError where the server lacks the operation."""
    from boto3.exceptions import RetriesExceededError
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from s3transfer.exceptions import RetriesExceededError as TransferFailed

    try:
        yield
    except ClientError as e:
        raise _of_response(e, location) from e
    except (RetriesExceededError, TransferFailed) as e:
        raise _unreachable(e.last_exception, location) from e
    except ResponseParserError as e:  # an answer that was cut off, or a proxy's
        raise StoreError(f"{_place(location)} gives an answer that is none of S3 ({e}); try again later") from e
    except BotoCoreError as e:
        raise _of_client(e, location) from e


def _of_response(error: Any, location: S3Location) -> LorayError:
    code, message = str(error.response["Error"].get("Code")), str(error.response["Error"].get("Message"))
    place = _place(location)
    if code == "NoSuchBucket":
        return missing_bucket(location)
    if code in _REFUSED:
        return StoreError(
            f"{place} refuses {error.operation_name} ({code}): check the keys (credentials_file of the store's URL, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), and that they may list, read, write and delete there"
        )
    if code in _ELSEWHERE:
        return StoreError(f"{place} lies in another region ({message}): add region=… to the store's URL")
    if code == "NotImplemented":
        return UnsupportedError(f"{place} does not implement what {error.operation_name} asks for: {message}")
    return StoreError(f"{place} failed in {error.operation_name}: {code} {message}; try again later")


def _of_client(error: Exception, location: S3Location) -> LorayError:
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        return StoreError(
            f"there are no keys for {_place(location)}: name a credentials_file in the store's URL, or set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return _unreachable(error, location)
    return StoreError(f"{_place(location)} cannot be used: {error}")


def missing_bucket(location: S3Location) -> StoreError:
    return StoreError(
        f"{_place(location)} does not exist; create the bucket first, for instance: aws s3 mb s3://{location.bucket}"
    )


def _unreachable(error: Exception, location: S3Location) -> StoreError:
    hint = "`loray up` starts a local server again" if location.is_local else "check endpoint_url and the network"
    return StoreError(f"{_place(location)} cannot be reached ({error}); {hint}, then try again")


def _place(location: S3Location) -> str:
    return f"bucket {location.bucket!r} at {endpoint_of(location) or 'AWS'}"
