"""Checks of what this machine is and how fast: its measured rates, and the tokens/s that they mean for the base."""

from __future__ import annotations

from loray.bases.config import ModelConfig
from loray.bases.registry import get_base
from loray.cli.doctor.finding import Finding, Situation, ok
from loray.cli.planning.devices import measured
from loray.errors import LorayError
from loray.machine import Machine, serving_dtype
from loray.planning.devices import gpu_here, host
from loray.planning.plan import make_plan
from loray.planning.run import run_of
from loray.recipes.defaults import complete, size_of
from loray.recipes.resolve import on_hardware
from loray.spec import TrainSpec

_ROW_LENGTH = 512
_REQUESTS, _PROMPT, _ANSWER = 32, 64, 32  # of the load that the estimate of serving is for
# Of what products and reading the weights alone would take, measured with SmolLM2-135M: 0.76 on two cores with AVX2
# (110 tokens/s), 0.78 on two with AVX512-BF16 (936 tokens/s).
_SERVED_SHARE = 0.77


def rates(s: Situation) -> Finding:
    """Measures this machine where that has not been done."""
    try:
        machine = measured(s.settings.home, even_if_busy=False)
    except LorayError as e:
        return ok(f"{Machine.here(s.settings.home).hardware.describe()}; not measured: {e}")
    told = machine.hardware.describe()
    if machine.rates is None:
        return ok(f"{told}; not measured yet, because it is busy")
    products = ", ".join(f"{dtype} {flops / 1e9:,.0f}" for dtype, flops in machine.rates.products.items())
    told += f"; products in GFLOP/s: {products}; memory {machine.rates.bandwidth / 1e9:.0f} GB/s"
    if machine.rates.gpu is not None:
        gpu = machine.rates.gpu
        told += f"; GPU {gpu.flops / 1e12:,.0f} TFLOP/s, {gpu.bandwidth / 1e9:,.0f} GB/s"
    return ok(told)


def base(s: Situation) -> Finding:
    """Estimates from the rates that `rates` has measured."""
    try:
        config = get_base(s.settings.home, s.spec.base).config
    except (LorayError, OSError):
        return ok(f"without the base {s.spec.base} there is no estimate")  # another check says that it is missing
    machine = Machine.here(s.settings.home)
    trains, serves = _training(config, machine), _serving(s, config, machine)
    return ok(f"{s.spec.base}: {trains}; {serves}")


def _training(config: ModelConfig, machine: Machine) -> str:
    fields = {"name": "estimate", "data": {"train": "data.jsonl", "max_length": _ROW_LENGTH}}
    recipe = TrainSpec.parse(complete(fields, size_of(config)), source="the usual recipe")
    spec, why = on_hardware(recipe, machine.hardware)
    device = gpu_here(machine) if spec.use_gpu else host(machine, 1)
    speed = ""
    if device is not None and (machine.rates is not None or not device.is_host):
        time = make_plan(run_of(spec, config, dtype=device.training_dtype), device).time
        speed = f", LoRA at about {_about(time.tokens_per_s)} tokens/s"
    return f"trains in {spec.dtype} ({why}){speed}"


def _serving(s: Situation, config: ModelConfig, machine: Machine) -> str:
    use_gpu = not s.spec.device.startswith("cpu")
    dtype, why = serving_dtype(machine.hardware, use_gpu=use_gpu, has_kernels=True)
    if s.spec.dtype != "auto":
        dtype, why = s.spec.dtype, "as given"
    rates = machine.rates
    steps = f"steps of up to {s.spec.max_num_seqs} requests and {s.spec.max_num_batched_tokens:,} tokens"
    if rates is None or (use_gpu and rates.gpu is None):
        return f"serves in {dtype} ({why}) with {steps}"
    flops, bandwidth = rates.fastest, rates.bandwidth
    if use_gpu and rates.gpu is not None:
        flops, bandwidth = rates.gpu.flops, rates.gpu.bandwidth
    elements = config.num_matrix_elements
    prompts = 2.0 * (elements - config.vocab_size * config.hidden_size) * _REQUESTS * _PROMPT / flops
    step = max(s.spec.element_bytes * elements / bandwidth, 2.0 * elements * _REQUESTS / flops)
    tokens_per_s = _SERVED_SHARE * _REQUESTS * _ANSWER / (prompts + _ANSWER * step)
    speed = f"{_REQUESTS} requests at once at about {_about(tokens_per_s)} tokens/s"
    return f"serves in {dtype} ({why}) with {steps}; {speed}"


def _about(value: float) -> str:
    """Two digits: estimates are not better."""
    return f"{float(f'{value:.2g}'):,.0f}"
