"""What a web page may not make its visitor's browser do to a server on loopback that needs no key.

A page of another site may send forms and plain text here, with the visitor's network but without reading the answer;
and with a name that it makes point at 127.0.0.1, it may read answers too (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from loray.errors import PermissionDenied, shown
from loray.locations import is_this_machine

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data", "text/plain"})
_NO_FORM_SENDS = frozenset({"authorization", "idempotency-key", "if-match", "x-requested-with"})
# What proxies add: who asks is elsewhere then, though the connection comes from this machine.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip", "via")
# Those of a request that are read here.
HEADERS = _NO_FORM_SENDS | {"content-type", "host", "origin", "sec-fetch-site", *_FORWARDED}
_MAKE_A_KEY = "or make a key, `loray keys create --scope admin`, and send it"


def refuse_strangers(method: str, headers: Mapping[str, str], names: frozenset[str]) -> None:
    """Raises PermissionDenied. `names`: what Host may say beside loopback's names and addresses."""
    for name in _FORWARDED:
        if name in headers:
            raise PermissionDenied(
                f"the header {name} says that a proxy has sent this on, and without keys this server answers to this "
                f"machine alone: ask it directly, {_MAKE_A_KEY}"
            )
    host = headers.get("host")
    if host is not None and not _is_ours(host, names):
        raise PermissionDenied(
            f"the header Host says {shown(host)}, and without keys this server answers to localhost alone: ask it by "
            f"that name, {_MAKE_A_KEY}"
        )
    if method in _READS:
        return
    refuse_other_sites(headers)
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    is_form = (media_type in _FORMS or not media_type) and not _NO_FORM_SENDS & headers.keys()
    if method == "POST" and is_form:
        raise PermissionDenied(
            f"a form of any web page may send {media_type or 'a request without a type'}: send the header "
            f"Content-Type: application/json, {_MAKE_A_KEY}"
        )


def refuse_other_sites(headers: Mapping[str, str]) -> None:
    """Raises PermissionDenied where a browser says that a page of another site sends this."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != headers.get("host"):
        raise PermissionDenied(f"a page of another site ({shown(origin)}) may not do this")
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise PermissionDenied("a page of another site may not do this")


def _is_ours(host: str, names: frozenset[str]) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        return False
    return name is not None and "@" not in host and (name in names or is_this_machine(host))
