"""The private names of Ray Serve: all that are used are known, and a Ray without one of them is refused."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.serve.request_router import RequestRouter

import serve_apps
from loray.errors import ClusterError
from serve_apps import serve_internals
from serve_apps.serve_internals import PRIVATE, Private, check

NAMES = {private.path.rsplit(".", 1)[-1] for private in PRIVATE}
ROOT = Path(serve_apps.__file__).parent


def trees() -> Iterator[tuple[Path, ast.Module]]:
    """Of the modules that import Ray Serve."""
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        if "ray.serve" in text or "import serve\n" in text or "serve_internals" in text:
            yield path, ast.parse(text)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_one_module_imports_private_names() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray.serve")
        if any(map(is_private, [*(node.module or "").split("."), *(alias.name for alias in node.names)]))
    }
    assert found == {"serve_internals.py"}


def test_all_private_names_that_are_used_are_known() -> None:
    used = set()
    for path, tree in trees():
        own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
        attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and is_private(n.attr)]
        own |= {n.attr for n in attributes if isinstance(n.ctx, ast.Store)}
        if path.name == "router.py":  # what it overrides is Serve's
            used |= {n for n in own if is_private(n) and hasattr(RequestRouter, n)}
            own -= used
        used |= {n.attr for n in attributes} - own
    used -= {"_own", "_exit", "_asdict", "_replace"}  # our own in another module, and Python's
    assert used <= NAMES, used - NAMES
    assert {name for name in NAMES if is_private(name)} - {"_get_global_client"} <= used


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: private.path)
def test_a_ray_without_one_of_them_is_refused(private: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    owner: Any = import_module(private.module)
    *outer, name = private.path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    if private.parameters is None:
        for base in (base for base in owner.__mro__[:-1] if "__init__" in vars(base)):
            code = base.__init__.__code__
            named = tuple(f"other_{n}" if n == name else n for n in code.co_names)
            monkeypatch.setattr(base.__init__, "__code__", code.replace(co_names=named))
    elif name == "__init__":
        monkeypatch.setattr(owner, name, lambda self: None)
    else:
        for base in getattr(owner, "__mro__", [owner]):
            if name in vars(base):
                monkeypatch.delattr(base, name)
    with pytest.raises(ClusterError, match=rf"Ray {ray.__version__}, whose .*{private.path} (is not there|has no)"):
        runpy.run_path(serve_internals.__file__)


def test_a_ray_with_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda self: None)
    with pytest.raises(ClusterError, match="has no parameter 'replicas'"):
        check()
