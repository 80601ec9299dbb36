# Everything runs in .venv, which is made at first use with your own pip configuration.
PYTHON ?= python3
BIN := .venv/bin
# Compiled modules are kept, also where an image's environment says otherwise: tests start hundreds of processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-cluster test-numeric test-kernels test-doors test-rest test-cuda test-portable test-arm test-slow test-fast test-browser check format docs bench bench-serve bench-front bench-cluster bench-trials bench-catalog bench-train bench-quality chaos fuzz gpu clean

demo: .venv/.ready
	$(BIN)/python examples/demo $(if $(KEEP),--keep) $(if $(PORT),--port $(PORT))

# Everything that needs neither a Ray cluster nor the kernels for GPUs. All parts are begun at once. The one that waits
# for servers comes first, and the others take the time that it leaves. The output comes when a part has ended.
test: .venv/.ready
	@$(MAKE) --no-print-directory --jobs=4 --output-sync=target test-numeric test-kernels test-rest test-doors

NUMERIC := $(addprefix tests/,engine golden planning simulation)
KERNELS := $(addprefix tests/,kernels train)
DOORS := $(addprefix tests/,cli serve_apps)
CUDA := tests/kernels/cuda

# Databases, stores and homes are made in memory where there is enough of it: a PostgreSQL database takes four times as
# long on a disk.
SCRATCH = $(if $(shell df --output=avail /dev/shm 2>/dev/null | awk '$$1 + 0 > 8000000'),TMPDIR=/dev/shm)
PYTEST = OMP_NUM_THREADS=1 $(SCRATCH) $(BIN)/python -m pytest

test-numeric: .venv/.ready
	nice -n 5 env $(PYTEST) -m "not cluster and not slow" $(NUMERIC)

test-kernels: .venv/.ready
	nice -n 5 env $(PYTEST) -m "not cluster and not slow" --ignore $(CUDA) $(KERNELS)

test-rest: .venv/.ready
	nice -n 5 env $(PYTEST) -m "not cluster and not slow" $(addprefix --ignore=,$(NUMERIC) $(KERNELS) $(DOORS))

test-doors: .venv/.ready
	$(PYTEST) -m "not cluster and not slow and not browser" $(DOORS)

# The kernels for GPUs, and engines with them, without one: CUDA C++ compiled for the CPU, Triton by its interpreter.
test-cuda: .venv/.ready
	$(PYTEST) -m "not slow" $(CUDA)

# Jobs, deployments and whole loops on one Ray cluster of this machine. Only files with such a test: to import the others
# takes seconds.
CLUSTER = $(sort $(shell grep -rl --include='test_*.py' 'mark\.cluster' tests)) tests/serve_apps/servers

test-cluster: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster and not slow" $(CLUSTER)

# What a slower CPU computes: torch's kernels and ours as on one with AVX-512 but no AMX, with AVX2, and on any x86-64.
PORTABLE = $(PYTEST) -m "not cluster and not slow" --ignore $(CUDA)

test-portable: .venv/.ready
	@if grep -qw amx_bf16 /proc/cpuinfo; then set -x; \
	  ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 $(PORTABLE) tests/kernels; fi
	@if grep -qw avx512f /proc/cpuinfo; then set -x; \
	  ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(PORTABLE) $(addprefix tests/,engine kernels train); \
	  else echo "without AVX-512, make test is the test with AVX2"; fi
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(PORTABLE) $(addprefix tests/,engine kernels)

# The kernels for ARM, emulated, which needs qemu-aarch64 and aarch64-linux-gnu-g++; and those for AVX2 with VNNI.
test-arm: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -m slow tests/kernels

# Killed workers and drivers, replicas that come and go, strategies on ranks, whole commands: minutes.
test-slow: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# The console in Chromium, where the system has one.
test-browser: .venv/.ready
	$(BIN)/python -m pytest -m browser -rs tests/serve_apps/console

# The pure parts. Importing torch, transformers, PEFT or Ray is an error there.
FAST := $(addprefix tests/,test_recommend.py schemas engine/memory engine/scheduling \
  planning policy simulation client test_locations.py) --ignore tests/planning/test_activations.py

test-fast: .venv/.ready
	$(BIN)/python -m pytest -p tests.fixtures.without_torch $(FAST)

check: .venv/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Makes the site without the network, once its tools are installed. To read it: python3 -m http.server --directory build/site
docs: .venv/.docs-ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "build/site/index.html is the documentation"

bench: .venv/.ready
	$(BIN)/python -m benchmarks.serving --preset quick --peer peft

bench-serve: .venv/.ready
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-front: .venv/.ready
	$(BIN)/python -m benchmarks.front $(ARGS)

bench-cluster: .venv/.ready
	$(BIN)/python -m benchmarks.cluster $(ARGS)

bench-trials: .venv/.ready
	$(BIN)/python -m benchmarks.cluster.trials store $(ARGS); store=$$?; \
	  $(BIN)/python -m benchmarks.cluster.trials flood $(ARGS) && exit $$store

bench-catalog: .venv/.ready
	$(BIN)/python -m benchmarks.catalog $(ARGS)

chaos: .venv/.ready
	$(BIN)/python -m tests.faults $(ARGS)

fuzz: .venv/.ready
	$(BIN)/python -m tests.faults.fuzz $(ARGS)

bench-train: .venv/.ready
	$(BIN)/python -m benchmarks.training $(ARGS)

bench-quality: .venv/.ready
	@test -n "$(DATA)" || { echo "name the folder of the tasks' files: make bench-quality DATA=folder"; exit 1; }
	$(BIN)/python -m examples.quality $(DATA) $(ARGS)

# With the Python that has torch, Triton and CuPy; nothing is installed. Without a card it lists what it would run.
gpu:
	PYTHONPATH=platform:kernels:.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv .cache build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "loray needs Python 3.11 or later; name one with make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --progress-bar on --editable ".[dev]"
	@touch $@

.venv/.docs-ready: .venv/.ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@
