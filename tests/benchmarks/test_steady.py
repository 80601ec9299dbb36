"""Which passes count while the machine becomes faster and slower."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.steady import Probe, Speed, Steady


class Machine:
    """Its speed is a function of its time; a pass takes ten seconds."""

    def __init__(self, memory: Callable[[float], float]) -> None:
        self.now, self._memory = 0.0, memory
        self.attempts: list[int] = []

    def probe(self) -> Speed:
        return Speed(self._memory(self.now), 1.0)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def one_pass(self, attempt: int) -> float:
        self.attempts.append(attempt)
        began = self.now
        self.now += 10.0
        return began

    def steady(self, patience_s: float) -> Steady:
        return Steady(self.probe, patience_s=patience_s, clock=lambda: self.now, sleep=self.sleep)


def test_the_start_is_what_the_machine_mostly_is() -> None:
    assert Machine(lambda now: 9.0 if now == 3 else 5.0).steady(1.0).start == Speed(5.0, 1.0)


def test_a_pass_waits_until_the_machine_is_as_at_the_start() -> None:
    machine = Machine(lambda now: 9.0 if 8 < now < 20 else 5.0)
    steady = machine.steady(60.0)
    machine.now = 9.0
    assert steady.run(machine.one_pass) == 20.0
    assert machine.attempts == [0]
    assert "repeated" not in steady.describe()


def test_a_pass_in_which_the_machine_changed_is_repeated() -> None:
    machine = Machine(lambda now: 9.0 if 15 < now < 20 else 5.0)
    steady = machine.steady(60.0)
    machine.now = 9.0
    assert steady.run(machine.one_pass) == 20.0
    assert machine.attempts == [0, 1]
    assert steady.num_repeated == 1
    assert "1 passes were repeated" in steady.describe()


def test_without_patience_a_pass_counts_and_is_told() -> None:
    machine = Machine(lambda now: 9.0 if now > 8 else 5.0)
    steady = machine.steady(30.0)
    machine.now = 9.0
    assert steady.run(machine.one_pass) == 39.0
    assert steady.run(machine.one_pass) == 49.0
    assert steady.num_unsteady == 2
    assert "2 count although it did" in steady.describe()


def test_a_change_within_the_tolerance_is_none() -> None:
    machine = Machine(lambda now: 5.5 if now > 8 else 5.0)
    steady = machine.steady(30.0)
    assert steady.run(machine.one_pass) == 8.0
    assert steady.num_unsteady == steady.num_repeated == 0


def test_a_probe_measures_the_machine() -> None:
    speed = Probe(1)()
    assert speed.memory > 1e8
    assert speed.compute > 1e6
