"""The benchmark of serving: adapters from a store, requests of a known distribution, and peers in the same run.

workload   arrival times, adapters and lengths of requests (pure)
adapters   random adapters in PEFT's format, published and fetched
cases      the cases, and presets, which are lists of cases
systems    the systems under test, each in separate processes, one at a time
figures    figures from the times of tokens and engine steps; floors, targets, the table and the picture (pure)
"""
