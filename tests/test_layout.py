"""The shape of the repository: what would break imports, and what the architecture promises."""

from __future__ import annotations

import ast
import importlib
import inspect
import platform
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "loray": "platform/loray",
    "loray_kernels": "kernels/loray_kernels",
    "jobs": "jobs",
    "serve_apps": "serve_apps",
}
FOLDERS = ("platform", "kernels", "jobs", "serve_apps", "benchmarks", "docs", "examples", "tests")
PYTHON_FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
SOURCES = sorted(
    p
    for folder in FOLDERS[:-1]
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and p.parent.name != "versions"
)
# Addresses that other people's configurations and code hold.
ADDRESSES = (
    "serve_apps.app:build",
    "serve_apps.app:AdapterRouter",
    "serve_apps.app:AdapterDemandPolicy",
    "serve_apps.api.app:build",
    "serve_apps.tinker.app:build",
    "jobs.train:main",
    "loray.client:LorayClient",
    "loray.client:CatalogClient",
    "loray.publishing:publish",
    "loray.train:s2_attention",
)


def test_platform_is_a_source_root_and_never_a_package() -> None:
    """With an `__init__.py` it would shadow Python's own module, which torch and pytest import."""
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not [p for p in (ROOT / "tests").rglob("platform") if p.is_dir()]
    assert Path(platform.__file__).name == "platform.py"


def test_packages_come_from_their_folders() -> None:
    code = f"from importlib.util import find_spec\nfor name in {list(PACKAGES)}: print(find_spec(name).origin)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.split() == [str(ROOT / folder / "__init__.py") for folder in PACKAGES.values()]


def test_the_wheel_holds_exactly_these_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES.values())


def test_files_stay_small() -> None:
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in {*SOURCES, *PYTHON_FILES}}
    assert not {path: n for path, n in lines.items() if n > 700}


def test_the_ways_through_the_house_name_what_stands_there() -> None:
    page = (ROOT / "docs/guide/architecture.md").read_text()
    product = [p for folder in PACKAGES.values() for p in (ROOT / folder).rglob("*.py")]
    modules = {p.relative_to(ROOT).as_posix(): p.read_text() for p in product}
    told = re.findall(r"`([^`\n]+)`", page[page.index("## One engine step") :])
    paths = [name for name in told if name.endswith(".py")]
    assert len(paths) > 40
    assert not [name for name in paths if not any(f"/{module}".endswith(f"/{name}") for module in modules)]
    members_of = [name.partition(".") for name in told if re.fullmatch(r"[A-Z]\w+(\.\w+)?", name)]
    named = re.compile(rf"^class ({'|'.join(owner for owner, _, _ in members_of)})\b", re.MULTILINE)
    trees = (ast.parse(text) for text in modules.values() if named.search(text))  # to parse all of them takes seconds
    classes = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.ClassDef)}
    for owner, _, method in members_of:
        members = {n.name for n in classes[owner].body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not method or method in members, f"{owner}.{method}"


def test_no_module_asks_which_method_or_objective_it_has() -> None:
    """A new one is an object in a registry: nobody else tells them apart by their classes."""
    kinds = "LoraSpec|LongLoraSpec|DoraSpec|VeraSpec|LoraWeights|VeraWeights|SftSpec|DpoSpec"
    asks = re.compile(rf"(isinstance\([^)]*\b({kinds})\b|type\([^)]*\) is ({kinds})\b)")
    found = {p for folder in PACKAGES.values() for p in (ROOT / folder).rglob("*.py") if asks.search(p.read_text())}
    assert {str(p.relative_to(ROOT)) for p in found} == {"platform/loray/engine/pool/packed.py"}  # DoRA's own rows


def test_addresses_that_others_hold_stay() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry_points = [*project["scripts"].values(), *project["entry-points"]["loray.commands"].values()]
    manifests = [*(ROOT / "infra").rglob("*.yaml"), *(ROOT / "serve_apps" / "configs").glob("*.yaml")]
    served = re.findall(r"import_path: (\S+)", "\n".join(p.read_text() for p in manifests))
    assert set(served) == {"serve_apps.app:build", "serve_apps.api.app:build", "serve_apps.tinker.app:build"}
    for address in {*ADDRESSES, *entry_points, *served}:
        module, _, name = address.partition(":")
        assert hasattr(importlib.import_module(module), name), address


def test_gateway_and_catalog_api_load_no_torch() -> None:
    modules = ("serve_apps.gateway.app", "serve_apps.api.app", "serve_apps.app", "serve_apps.tinker.app")
    code = "import importlib, sys\n"
    code += f"for module in {modules}:\n"
    code += "    importlib.import_module(module)\n"
    code += "    print(module, [m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [f"{module} []" for module in modules]


def test_http_status_codes_are_for_those_who_speak_http() -> None:
    """Those who answer (serve_apps), and the clients of a server: ours, and S3's."""
    library = (p for p in (ROOT / "platform").rglob("*.py") if p.parent.name not in ("client", "store"))
    assert not [str(p.relative_to(ROOT)) for p in library if re.search(r"status_code|HTTPStatus", p.read_text())]


def test_every_module_says_what_it_is() -> None:
    docstring = re.compile(r'(#.*\n|\n)*r?"""\S')
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in PYTHON_FILES}
    assert not [path for path, text in texts.items() if text.strip() and not docstring.match(text)]


def test_help_is_quick_because_it_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from loray.cli.main import cli;"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0;"
        "heavy = 'torch ray transformers peft fastapi prometheus_client boto3 sqlalchemy alembic'.split();"
        "print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_no_module_imports_a_module_of_tests() -> None:
    """What several of them use stands in a conftest.py, in tests/fixtures or in a module of cases."""
    imports = re.compile(r"^\s*(?:from|import) tests\b[^\n(]*(?:\([^)]*)?\btest_", re.MULTILINE)
    found = set()
    for path in PYTHON_FILES:
        text = path.read_text()
        if not imports.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
            files = (ROOT / f"{module.replace('.', '/')}.py" for module in modules if module.startswith("tests."))
            if any(file.name.startswith("test_") and file.exists() for file in files):
                found.add(str(path.relative_to(ROOT)))
    assert not found


def test_the_errors_docstring_lists_every_error() -> None:
    from loray import errors

    found = vars(errors).items()
    classes = {n for n, c in found if inspect.isclass(c) and issubclass(c, errors.LorayError) and n[0] != "_"}
    assert errors.__doc__ is not None
    assert not {n for n in classes if n not in errors.__doc__}
