"""The quantile that other benchmarks ask for here."""

from benchmarks.report import quantile as quantile
