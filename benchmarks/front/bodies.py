"""Bodies that must be refused, and the largest that are read before they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from serve_apps.http import MAX_VALUES

NUMBER = "NUMBER"  # stands for that of the repetition, because servers remember constraints that they have refused
_CHUNK = 1 << 16


class Bad(NamedTuple):
    """`content` None: the size is not said, and `pieces` of _CHUNK spaces are sent in chunks."""

    content: bytes
    pieces: int = 0

    def request(self) -> bytes:
        """The whole HTTP request."""
        head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        if not self.pieces:
            return f"{head}content-length: {len(self.content)}\r\n\r\n".encode() + self.content
        chunk = b"%x\r\n%b\r\n" % (_CHUNK, b" " * _CHUNK)
        return f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk * self.pieces + b"0\r\n\r\n"


def _body(model: str, **fields: Any) -> Bad:
    return Bad(json.dumps({"model": model, "prompt": "a", **fields}).encode())


def _product(num_pairs: int) -> dict[str, Any]:
    """A schema of 2^num_pairs combinations."""
    pairs = [[{"properties": {f"{k}{i}-{NUMBER}": {"type": "null"}}} for k in "ab"] for i in range(num_pairs)]
    return {"allOf": [{"anyOf": pair} for pair in pairs]}


_MANY = {"type": "object", "properties": {f"p{i}-{NUMBER}": {} for i in range(2000)}}  # more than a schema may have
_CHOICES = [f"option {i}-{NUMBER}" for i in range(10_000)]
_FEWER_IDS = MAX_VALUES - 100
# By name: of the model, and the largest size that is read.
BODIES: Mapping[str, Callable[[str, int], Bad]] = {
    "60 MB of text": lambda model, limit: _body(model, prompt="word " * 12_000_000),
    "60 MB, size not said": lambda model, limit: Bad(b"", 60_000_000 // _CHUNK),
    "5,000,000 ids": lambda model, limit: _body(model, prompt=[7] * 5_000_000),
    "100,000 brackets": lambda model, limit: Bad(b"[" * 100_000),
    "10,000 stop strings": lambda model, limit: _body(model, stop=["x"] * 10_000),
    "a schema that explodes": lambda model, limit: _body(model, guided_json=_product(20)),
    "one that explodes later": lambda model, limit: _body(model, guided_json=_product(9)),
    "2,000 properties": lambda model, limit: _body(model, guided_json=_MANY),
    "50,000 nested groups": lambda model, limit: _body(model, guided_regex="(" * 50_000),
    "10,000 choices": lambda model, limit: _body(model, guided_choice=_CHOICES),
    "as much text as is read": lambda model, limit: _body(model, prompt="word " * ((limit - 100) // 5)),
    "as many ids as are read": lambda model, limit: _body(model, prompt=[7] * min((limit - 100) // 3, _FEWER_IDS)),
    "as many arrays as are read": lambda model, limit: _body(model, prompt=[[7] * 6] * 32_000),
}
