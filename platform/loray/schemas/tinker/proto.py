"""The protobuf messages of Tinker's protocol, declared by their field numbers.

The declarations have a descriptor pool of their own, so they do not meet those of an SDK in the same process. Enums are
declared as int32, which is the same on the wire; fields that nothing here reads are left out, and skipped when a client
sends them. `protobuf` comes with Ray.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from loray.errors import RequestError

_FIELD = descriptor_pb2.FieldDescriptorProto
_BYTES, _STRING, _BOOL, _DOUBLE = _FIELD.TYPE_BYTES, _FIELD.TYPE_STRING, _FIELD.TYPE_BOOL, _FIELD.TYPE_DOUBLE
_INT32, _INT64, _UINT32 = _FIELD.TYPE_INT32, _FIELD.TYPE_INT64, _FIELD.TYPE_UINT32
_PACKAGE = "loray_tinker"


class _Field(NamedTuple):
    """`kind`: a scalar's type, or a message's name. `oneof`: the name of the one that the field belongs to."""

    number: int
    kind: int | str
    repeated: bool = False
    is_map: bool = False  # from strings
    oneof: str | None = None


_MESSAGES: dict[str, dict[str, _Field]] = {
    "SparseCsr": {
        "values": _Field(1, _BYTES),
        "crow_indices": _Field(2, _BYTES),
        "col_indices": _Field(3, _BYTES),
    },
    "Tensor": {
        "dense": _Field(1, _BYTES, oneof="encoding"),
        "sparse_csr": _Field(2, "SparseCsr", oneof="encoding"),
        "dtype": _Field(3, _INT32),
        "shape": _Field(4, _INT64, repeated=True),
    },
    "EncodedTextChunk": {"tokens": _Field(1, _BYTES)},
    "OtherChunk": {},  # an image or a sound, which is only recognised
    "Chunk": {
        "encoded_text": _Field(1, "EncodedTextChunk", oneof="chunk"),
        "image": _Field(2, "OtherChunk", oneof="chunk"),
        "dmel": _Field(3, "OtherChunk", oneof="chunk"),
    },
    "Datum": {
        "model_input": _Field(1, "Chunk", repeated=True),
        "loss_fn_inputs": _Field(2, "Tensor", is_map=True),
    },
    "LossConfigValue": {
        "number": _Field(1, _DOUBLE, oneof="value"),
        "text": _Field(2, _STRING, oneof="value"),
    },
    "ForwardBackwardRequest": {
        "model_id": _Field(1, _STRING),
        "seq_id": _Field(2, _INT32),
        "data": _Field(3, "Datum", repeated=True),
        "loss_fn": _Field(4, _STRING),
        "loss_fn_config": _Field(5, _DOUBLE, is_map=True),
        "forward_only": _Field(6, _BOOL),
        "loss_fn_config_v2": _Field(7, "LossConfigValue", is_map=True),
    },
    "BatchedTensor": {
        "data": _Field(1, _BYTES),
        "offsets": _Field(2, _BYTES),
        "dtype": _Field(3, _INT32),
        "trailing_shape": _Field(4, _INT64, repeated=True),
    },
    "ArrayRecord": {
        "type_tag": _Field(1, _STRING),
        "fields": _Field(2, "BatchedTensor", is_map=True),
        "num_datums": _Field(3, _INT64),
    },
    "ForwardBackwardOutput": {
        "loss_fn_output_type": _Field(1, _STRING),
        "loss_fn_outputs": _Field(2, "ArrayRecord", repeated=True),
        "metrics": _Field(3, _DOUBLE, is_map=True),
    },
    "TopkLogprobs": {
        "token_ids": _Field(1, _BYTES),
        "logprobs": _Field(2, _BYTES),
        "k": _Field(3, _UINT32),
        "length": _Field(4, _UINT32),
    },
    "SampledSequence": {
        "stop_reason": _Field(1, _INT32),
        "tokens": _Field(2, _BYTES),
        "logprobs": _Field(3, _BYTES),
        "topk_sampled_logprobs": _Field(4, "TopkLogprobs"),
    },
    "SampleResponse": {
        "sequences": _Field(1, "SampledSequence", repeated=True),
        "prompt_logprobs": _Field(2, _BYTES),
        "topk_prompt_logprobs": _Field(3, "TopkLogprobs"),
        "prompt_cache_hit_tokens": _Field(4, _INT32),
    },
}


def _declared() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, field in fields.items():
            _add(message, name, field_name, field)
    return file


def _add(message: descriptor_pb2.DescriptorProto, owner: str, name: str, field: _Field) -> None:
    kind: int | str = field.kind
    if field.is_map:
        entry = message.nested_type.add(name="".join(part.title() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _add(entry, owner, "key", _Field(1, _STRING))
        _add(entry, owner, "value", _Field(2, field.kind))
        kind = f"{owner}.{entry.name}"
    label = _FIELD.LABEL_REPEATED if field.repeated or field.is_map else _FIELD.LABEL_OPTIONAL
    added = message.field.add(name=name, number=field.number, label=label)
    if isinstance(kind, str):
        added.type, added.type_name = _FIELD.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        added.type = kind
    if field.oneof is not None:
        if field.oneof not in [oneof.name for oneof in message.oneof_decl]:
            message.oneof_decl.add(name=field.oneof)
        added.oneof_index = [oneof.name for oneof in message.oneof_decl].index(field.oneof)


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_declared())


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


ForwardBackwardRequest = _class("ForwardBackwardRequest")
ForwardBackwardOutput = _class("ForwardBackwardOutput")
SampleResponse = _class("SampleResponse")


def parse(message: Any, raw: bytes) -> Any:
    """Return the message of this class that `raw` is. Raises RequestError."""
    parsed = message()
    try:
        parsed.ParseFromString(raw)
    except DecodeError as e:
        raise RequestError(f"the body is no {message.DESCRIPTOR.name} in protobuf: {e}") from e
    return parsed


# -- compressed bodies -------------------------------------------------------------------------------------------------

MAX_BYTES = 64 << 20  # of a body, decompressed
_CHUNK = 1 << 20


def reads_zstd() -> bool:
    """Whether zstandard is installed (`loray[tinker]`)."""
    return find_spec("zstandard") is not None


def decompress(raw: bytes, encoding: str) -> bytes:
    """Return the body of a request with this Content-Encoding, counted while it grows. Raises RequestError."""
    if encoding == "identity":
        return raw
    if encoding != "zstd" or not reads_zstd():
        raise RequestError(f"Content-Encoding {encoding} is not read here; send the body as it is", "Content-Encoding")
    import zstandard

    parts, num_bytes = [], 0
    try:
        plain = zstandard.ZstdDecompressor(max_window_size=MAX_BYTES)
        with plain.stream_reader(raw, read_across_frames=True) as reader:
            while part := reader.read(_CHUNK):
                num_bytes += len(part)
                if num_bytes > MAX_BYTES:
                    raise RequestError(f"the body is larger than {MAX_BYTES >> 20} MiB once it is decompressed")
                parts.append(part)
    except zstandard.ZstdError as e:
        raise RequestError(f"the body is not compressed with zstd: {e}", "Content-Encoding") from e
    return b"".join(parts)
