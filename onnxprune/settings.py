"""Everything that a run may be told, besides the model and the speed-up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from onnxprune.budget import ALLOCATIONS
from onnxprune.effort import BALANCED, QUICK, THOROUGH, Effort
from onnxprune.errors import InputError
from onnxprune.images import Preprocessing
from onnxprune.selection import FROM_ACTIVATIONS, METHODS
from onnxprune.targets import multiple_of


@dataclass(frozen=True, eq=False)
class Settings:
    """The options of `onnxprune.prune`, which says what each of them means.

    Raises:
        InputError: one of them cannot be used, whatever the model.
    """

    by: str = "macs"
    max_macs: float | None = None
    max_params: float | None = None
    max_memory: float | None = None
    round_to: int | str | None = None
    target: str | None = None
    shapes: Mapping[str, Sequence[int]] | None = None
    batch: int | None = None
    data: object = None
    samples: int | None = None
    batch_size: int | None = None
    memory: int | None = None
    dask: str | None = None
    seed: int = 0
    threads: int = 0
    provider: str = "cpu"
    select: str = "greedy"
    budget: str = "auto"
    reconstruct: bool = True
    quick: bool = False
    thorough: bool = False
    mirror: bool = True
    only: str | None = None
    exclude: str | None = None
    samplers: bool = True
    approximate: bool = False
    best_effort: bool = False
    preprocessing: Preprocessing | None = None
    stats: str | Path | None = None

    def __post_init__(self) -> None:
        if self.select not in METHODS:
            raise InputError(f"unknown selection {self.select!r}; expected one of {', '.join(METHODS)}")
        if self.budget not in ALLOCATIONS:
            raise InputError(f"unknown budget {self.budget!r}; expected one of {', '.join(ALLOCATIONS)}")
        for name in ("samples", "batch_size", "batch", "memory", "seed", "threads"):
            value = getattr(self, name)
            if value is not getattr(Settings, name) and not isinstance(value, Integral):  # None where it is the default
                raise InputError(f"expected a whole number as {name}, found {value!r}")
            object.__setattr__(self, name, value if value is None else int(value))  # NumPy's know no JSON
        for name, value in (("samples", self.samples), ("batch size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"expected a number of {name} of at least 1, found {value}")
        if self.quick and self.thorough:
            raise InputError("expected quick or thorough, found both; try neither")
        if (self.quick or self.thorough) and (self.stats is not None or not self.reconstruct):
            other = "kept statistics" if self.stats is not None else "no reconstruction"
            how = "quick" if self.quick else "thorough"
            raise InputError(f"expected {how} or {other}, found both: there is nothing left to be {how} about")
        multiple_of(self.round_to, self.target)

    @property
    def effort(self) -> Effort:
        """What is spent on fitting well."""
        return QUICK if self.quick else THOROUGH if self.thorough else BALANCED

    @property
    def sample_count(self) -> int:
        """How many samples are used at most."""
        return self.samples or self.effort.samples

    @property
    def most(self) -> dict[str, float]:
        """Limits besides the speed-up, by the names that costs have."""
        given = {"macs": self.max_macs, "params": self.max_params, "memory": self.max_memory}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def multiple(self) -> int:
        """What kept channels are to be a multiple of."""
        return multiple_of(self.round_to, self.target)

    @property
    def measured(self) -> bool:
        """Whether the activations are looked at."""
        return self.reconstruct or self.select in FROM_ACTIVATIONS
