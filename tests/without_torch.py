"""A pytest plugin, `-p tests.without_torch`: importing torch is an error. For the parts that promise to do without."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder

_REFUSED = ("torch", "transformers", "peft", "ray")


class _Refuse(MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in _REFUSED:
            raise ImportError(f"{name} is not to be imported here: this part is plain Python")


sys.meta_path.insert(0, _Refuse())
