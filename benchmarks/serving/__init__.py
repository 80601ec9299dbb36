"""The benchmark of serving: n adapters from a store, requests of a known distribution, peers side by side in one run.

workload   which request comes when, for which adapter (pure)
adapters   random adapters in PEFT's format, published and fetched
cases      what is measured; presets are lists of cases
systems    who is measured: each in processes of its own, one at a time
figures    from the times of tokens and of engine steps to numbers (pure); floors: what the machine allows (pure)
targets    what the project promised itself, beside what was reached
"""
