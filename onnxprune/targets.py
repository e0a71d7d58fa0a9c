"""What is asked for: a ratio in one unit, limits in others, and the widths that the deployment likes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.budget import every_count
from onnxprune.costs import Cost, CostModel, PeakMemory, parameters
from onnxprune.errors import InputError, UnreachableTarget
from onnxprune.macs import holds_macs

UNITS = {"macs": "MACs", "params": "parameters", "memory": "bytes of activations at the peak", "latency": "latency"}

# what channel counts are best multiples of, on targets that are not at hand, and who says so
TARGETS: Mapping[str, tuple[int, str]] = {
    "cpu-avx2": (8, "onnxruntime/core/mlas/lib/platform.cpp: NchwcBlockSize = 8"),
    "cpu-avx512": (16, "onnxruntime/core/mlas/lib/platform.cpp: NchwcBlockSize = 16 with AVX512F"),
    "cuda": (8, "PyTorch Performance Tuning Guide: to use Tensor Cores, set sizes to multiples of 8"),
    "tensorrt": (8, "TensorRT documentation, Data Format Descriptions: NHWC8 (FP16, channels padded to 8)"),
    "tensorrt-int8": (32, "TensorRT documentation, TensorFormat::kCHW32 (INT8, channels padded to 32)"),
    "hexagon": (32, "Qualcomm 80-63442-10, HTP guidelines: round channels up to a multiple of 32"),
    "ti-npu": (4, "TI Neural Network Compiler, NPU guidelines: input and output channels are multiples of 4"),
}


def multiple_of(round_to: int | str | None, target: str | None) -> int:
    """What channel counts are to be a multiple of: a number, or that of a target by its name.

    Raises:
        InputError: there is no such target, or nothing says which number is meant.
    """
    if target is not None and target not in TARGETS:
        raise InputError(f"unknown target {target!r}; expected one of {', '.join(TARGETS)}")
    if round_to is None or round_to == "auto":
        if target is None and round_to is not None:
            raise InputError("--round-to auto takes the number from --target; name one, or give the number")
        return TARGETS[target][0] if target is not None else 1
    if not isinstance(round_to, Integral) or round_to < 1:
        raise InputError(f"expected a number of at least 1 or auto for --round-to, found {round_to!r}")
    return round_to


@dataclass(frozen=True)
class Wanted:
    """A ratio before / after, what it is counted in, and the most of other costs that may be left."""

    speedup: float = 2.0
    by: str = "macs"
    most: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.speedup, bool) or not isinstance(self.speedup, Real):  # NumPy's among them
            raise InputError(f"expected a speed-up above 1, found {self.speedup!r}; try --speedup 2")
        if not np.isfinite(self.speedup) or self.speedup <= 1:
            raise InputError(f"expected a speed-up above 1, found {self.speedup}; try --speedup 2")
        if self.by not in UNITS:
            raise InputError(f"unknown unit {self.by!r} of the budget; expected one of {', '.join(UNITS)}")
        for name, value in self.most.items():
            if not (isinstance(value, Real) and value > 0):
                raise InputError(f"expected a number above 0 for --max-{name}, found {value!r}")


@dataclass(frozen=True, eq=False)
class Limit:
    """The most that may be left of a cost."""

    name: str
    cost: Cost
    limit: float


def counted_costs(analysis: Analysis, names: Collection[str], copies: Collection[str]) -> dict[str, Cost]:
    """Costs that are counted, by name."""
    found: dict[str, Cost] = {}
    for name in names:
        if name == "macs":
            found[name] = CostModel(analysis)
        elif name == "params":
            found[name] = parameters(analysis, copies)
        elif name == "memory":
            found[name] = PeakMemory(analysis)
    return found


def limits(
    analysis: Analysis,
    wanted: Wanted,
    costs: Mapping[str, Cost],
    before: Mapping[str, float],
    choices: list[np.ndarray],
    best_effort: bool,
) -> list[Limit]:
    """The limits that the kept counts have to meet, the one of the ratio first where it is a counted one.

    Args:
        analysis: of the model.
        wanted: what is asked for.
        costs: by name, of everything that is limited.
        before: what the original costs, by name.
        choices: per group the kept counts to choose from.
        best_effort: go as far as possible where a limit cannot be met.

    Raises:
        UnreachableTarget: a limit cannot be met, and ``best_effort`` is not given.
    """
    least = np.array([c[0] for c in choices], dtype=np.int64)
    found = []
    if wanted.by in costs:
        floor = costs[wanted.by].total(least)
        reachable = before[wanted.by] / floor if len(least) and floor else 1.0
        speedup = wanted.speedup
        if reachable < speedup:
            if not best_effort or reachable <= 1.0:
                raise unreachable(analysis, wanted, reachable, _rounded(costs[wanted.by], before[wanted.by], least))
            speedup = reachable
        found.append(Limit(wanted.by, costs[wanted.by], before[wanted.by] / speedup))
    for name, most in wanted.most.items():
        floor = costs[name].total(least)
        if floor > most and not best_effort:
            raise UnreachableTarget(
                f"at most {most:g} {UNITS[name]} cannot be reached; the fewest for this model are {math.ceil(floor)}"
                f"{_what_holds(analysis)} (see onnxprune inspect; --best-effort goes as far as possible)",
                before[name] / floor,
            )
        found.append(Limit(name, costs[name], max(most, floor)))
    return found


def rounded_down(number: float) -> str:
    """Three digits of a number, and not more than it is: what is said to be reachable can be asked for.

    >>> rounded_down(75.896), rounded_down(2.0), rounded_down(1.0)
    ('75.8', '2', '1')
    """
    if not math.isfinite(number):
        return f"{number:g}"
    step = 10.0 ** (math.floor(math.log10(number)) - 2)
    return f"{math.floor(number / step * (1 + 1e-12)) * step:.3g}"


def unreachable(analysis: Analysis, wanted: Wanted, reachable: float, where: str = "") -> UnreachableTarget:
    """What to say where the ratio cannot be reached."""
    unit = "" if wanted.by == "macs" else f" in {UNITS[wanted.by]}"
    further = "; --best-effort goes as far as possible" if reachable > 1.0 else ""
    return UnreachableTarget(
        f"a speed-up of {wanted.speedup:g}{unit} cannot be reached; the largest for this model is"
        f" {rounded_down(reachable)}{where}{_what_holds(analysis)} (see onnxprune inspect{further})",
        reachable,
    )


def _rounded(cost: Cost, before: float, least: np.ndarray) -> str:
    """A word on widths that have to be multiples, where narrower ones cost less."""
    fewest = cost.total(np.ones_like(least)) if len(least) else 0.0
    if not fewest or fewest >= cost.total(least):
        return ""
    any_width = rounded_down(before / fewest)
    return f" at widths that are multiples, which --round-to or --target asks for ({any_width} at any width)"


def _what_holds(analysis: Analysis) -> str:
    blocking = max(analysis.frozen, key=lambda f: f.macs, default=None)
    if blocking is None:
        return ""
    at = f" at node {blocking.node!r} ({blocking.op})" if blocking.node else f" ({blocking.tensor!r})"
    return f"; most is held back by: {blocking.reason}{at}"


def widths(analysis: Analysis, multiple: int = 1) -> list[np.ndarray]:
    """Per group the kept counts to choose from, ascending.

    With a ``multiple``, those whose channels in every layer are one, and the whole group, which may be none.
    """
    every = every_count([g.units for g in analysis.groups])
    if multiple <= 1:
        return every
    graph = analysis.graph
    constant = graph.computed_from_constants  # quantised weights among them, and those of layers that are not fitted
    weights = {name for node in graph.nodes if holds_macs(node) for name in node.inputs if name in constant}
    found = []
    for info, counts in zip(analysis.groups, every, strict=True):
        each = {a.positions.shape[1] for a in info.group.axes if a.tensor in weights} or {1}
        fits = np.all([counts * positions % multiple == 0 for positions in each], axis=0)
        found.append(counts[fits | (counts == info.units)])
    return found
