"""Adapter methods. Each is one object of `METHODS`, which no torch is needed to read."""

from collections.abc import Mapping

from loray.methods.alora import Alora
from loray.methods.base import Method
from loray.methods.dora import Dora
from loray.methods.ia3 import Ia3
from loray.methods.lora import LongLora, Lora
from loray.methods.miss import Miss
from loray.methods.road import Road
from loray.methods.vera import Vera
from loray.spec import AdapterSpec
from loray.spec import Method as AdapterMethod

_METHODS: tuple[Method, ...] = (Lora(), Dora(), Vera(), Miss(), LongLora(), Ia3(), Road(), Alora())
METHODS: Mapping[AdapterMethod, Method] = {method.name: method for method in _METHODS}

# By `peft_type`. DoRA, LongLoRA and aLoRA are LORA there, and are read as it is.
METHODS_OF_PEFT: Mapping[str, Method] = {method.peft_type: method for method in reversed([*METHODS.values()])}
_FP32_PARTS = tuple(f".{part}." for method in METHODS.values() for part in method.fp32_parts)


def method_of(spec: AdapterSpec) -> Method:
    return METHODS[spec.method]


def keeps_fp32(name: str) -> bool:
    """True where the parameter of this name is one of its method's `fp32_parts`."""
    return any(part in f"{name}." for part in _FP32_PARTS)


__all__ = ["METHODS", "METHODS_OF_PEFT", "Method", "keeps_fp32", "method_of"]
