"""Field types of specs: names, sizes, and frozen models that refuse unknown fields."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails

from loray.errors import SpecError

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
Alias = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,47}$")]
JobId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
TagKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}$")]
TagValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x08\x0b-\x1f]*$", max_length=5000)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BaseSize = Literal["small", "large"]
ToolParserName = Literal["hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder"]
ReasoningParserName = Literal["qwen3", "deepseek_r1"]
DType = Literal["bfloat16", "float16", "float32"]
AnyDType = DType | Literal["auto"]  # auto: what is fast on the device, see `loray.machine`
DTYPE_BYTES: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MAX_CONTEXT = 1 << 24  # tokens of any model
DEFAULT_ALIAS = "prod"  # the version that a name without a selector means, where this alias is set

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*$")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


class Default(NamedTuple):
    """The default of a recipe's field. `value` None: the specification's own. `large`: on a large base, where that
    differs.
    """

    why: str
    value: object = None
    large: object = None

    def on(self, size: BaseSize) -> object:
        return self.large if size == "large" and self.large is not None else self.value


def parse_size(value: object) -> object:
    """`"512MiB"` → 536870912; numbers pass through. Raises ValueError on an unknown unit."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise ValueError(f"{value!r} is not a size; write bytes, or a number with KiB, MiB, GiB, KB, MB or GB")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def format_size(nbytes: float) -> str:
    """`1234567` → "1.2 MB"."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "kB", "MB", "GB"):  # noqa: B007
        if value < 1000:
            break
        value /= 1000
    else:
        unit = "TB"
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """`0.0123` → "12.3 ms", `1234.5` → "1,234 s"."""
    value, unit = (seconds, "s") if abs(seconds) >= 0.9995 else (1000 * seconds, "ms")
    return f"{value:.3g} {unit}" if abs(value) < 999.5 else f"{value:,.0f} {unit}"


def printable(text: str) -> str:
    """Take out control characters, by which a text could change what a terminal shows; lines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


NumBytes = Annotated[int, BeforeValidator(parse_size), Field(gt=0)]


def mistakes(error: ValidationError) -> list[ErrorDetails]:
    """The wrong fields, without those whose default could not be found because another field is wrong."""
    return [e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"]


class Frozen(BaseModel):
    """A frozen model. `NOUN` is what messages call it; it is empty where the source of the data says that."""

    NOUN: ClassVar[str] = ""
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @classmethod
    def parse(cls, data: Any, *, source: str) -> Self:
        """`data` as a model. Raises SpecError, which names `source` and has one line per wrong field."""
        try:
            return cls.model_validate(data)
        except ValidationError as e:
            lines = []
            for err in mistakes(e):
                where = ".".join(str(part) for part in err["loc"]) or "(top level)"
                known = ""
                if err["type"] == "extra_forbidden" and len(err["loc"]) == 1:
                    known = f"; known fields: {', '.join(cls.model_fields)}"
                told = "must be a mapping of fields" if err["type"] == "model_type" else err["msg"]
                lines.append(f"  {where}: {told}{known}")
            valid = f"a valid {cls.NOUN}" if cls.NOUN and not source.endswith(cls.NOUN) else "valid"
            raise SpecError(f"{source} is not {valid}:\n" + "\n".join(lines)) from e

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        return cls.parse(read_mapping(path), source=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SpecError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise SpecError(f"cannot read {path}: {e.strerror or e}") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SpecError(f"{path} is not valid YAML: {e}") from e
    if not isinstance(data, dict):
        raise SpecError(f"{path} must hold a mapping of fields, not {type(data).__name__}")
    return data
