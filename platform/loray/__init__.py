"""loray: train, publish and serve thousands of LoRA, VeRA and LongLoRA adapters on one base model, on Ray."""

import os

__version__ = "0.1.0"

# An OpenMP thread that waits spins for 0.1 ms and then leaves its processor to others. By default it spins for 4 ms,
# longer than all that an engine does between two steps. libgomp reads this when torch is loaded.
SPIN_COUNT = "10000"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
