"""The model's size that other benchmarks ask for here."""

from benchmarks.serving.floors import ModelSize as ModelSize
