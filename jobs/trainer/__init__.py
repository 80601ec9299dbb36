"""The trainer of a base: one process that trains many models of it, each an adapter, for whoever sends operations."""

from jobs.trainer.client import TrainerClient
from jobs.trainer.start import trainer_of

__all__ = ["TrainerClient", "trainer_of"]
