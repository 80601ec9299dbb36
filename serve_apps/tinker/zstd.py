"""Bodies that a client has compressed."""

from __future__ import annotations

from importlib.util import find_spec

from loray.errors import RequestError

MAX_BYTES = 64 << 20  # of a body, decompressed
_CHUNK = 1 << 20


def is_supported() -> bool:
    """Whether zstandard is installed (`loray[tinker]`)."""
    return find_spec("zstandard") is not None


def decompress(raw: bytes, encoding: str) -> bytes:
    """Return the body of a request with this Content-Encoding, counted while it grows. Raises RequestError."""
    if encoding == "identity":
        return raw
    if encoding != "zstd" or not is_supported():
        raise RequestError(f"Content-Encoding {encoding} is not read here; send the body as it is", "Content-Encoding")
    import zstandard

    parts, num_bytes = [], 0
    try:
        with zstandard.ZstdDecompressor(max_window_size=MAX_BYTES).stream_reader(
            raw, read_across_frames=True
        ) as reader:
            while part := reader.read(_CHUNK):
                num_bytes += len(part)
                if num_bytes > MAX_BYTES:
                    raise RequestError(f"the body is larger than {MAX_BYTES >> 20} MiB once it is decompressed")
                parts.append(part)
    except zstandard.ZstdError as e:
        raise RequestError(f"the body is not compressed with zstd: {e}", "Content-Encoding") from e
    return b"".join(parts)
