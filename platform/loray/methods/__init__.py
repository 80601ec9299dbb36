"""Adapter methods. Each is one object of `METHODS`, which no torch is needed to read."""

from collections.abc import Mapping

from loray.methods.alora import Alora
from loray.methods.base import Method
from loray.methods.dora import Dora
from loray.methods.lora import LongLora, Lora
from loray.methods.vera import Vera
from loray.spec import AdapterSpec
from loray.spec import Method as AdapterMethod

METHODS: Mapping[AdapterMethod, Method] = {
    method.name: method for method in (Lora(), Dora(), Vera(), LongLora(), Alora())
}

# By `peft_type`. DoRA, LongLoRA and aLoRA are LORA there, and are read as it is.
METHODS_OF_PEFT: Mapping[str, Method] = {method.peft_type: method for method in reversed([*METHODS.values()])}


def method_of(spec: AdapterSpec) -> Method:
    return METHODS[spec.method]


__all__ = ["METHODS", "METHODS_OF_PEFT", "Method", "method_of"]
