"""How far a network's outputs are from the original's.

Class scores are compared as distributions, other outputs by squared error; scores and numbers that a softmax or a
sigmoid ends in, or that a class, an order or a whole number is made of, in front of that.

Of few samples the divergence between distributions says little where the answers are all but certain: the few samples
near a border between classes decide it alone. So scores are divided by a temperature (Hinton et al. 2015) at which the
original's answers are uncertain enough; in the limit that is squared error, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import entr, log_softmax, softmax

from onnxprune.graph import FLOATS, Graph, Node

_UNCERTAIN = 0.25  # mean entropy of the answers, of that of a guess
_HOTTEST = 20.0  # power of two
_SQUASHING = ("Softmax", "LogSoftmax", "Sigmoid")
_MOVING = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose")
_DECIDING = ("ArgMax", "ArgMin", "TopK", "QuantizeLinear")
COMPARING = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")


@dataclass(frozen=True)
class Yardstick:
    """What an output's changes are compared with: its variance, and a temperature where it is scores of classes."""

    variance: float
    temperature: float | None


def yardsticks(outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Yardstick]:
    """Of every floating-point output, from what all samples gave."""
    found = {}
    for name in outputs[0]:
        arrays = [part[name] for part in outputs if part[name].dtype.kind == "f" and part[name].size]
        values = [a[np.isfinite(a)] for a in arrays]
        count = sum(v.size for v in values)
        mean = sum(float(v.sum(dtype=np.float64)) for v in values) / max(count, 1)
        variance = sum(float(np.square(v - mean, dtype=np.float64).sum()) for v in values) / max(count, 1)
        scores = bool(arrays) and all(a.ndim == 2 and a.shape[1] > 1 for a in arrays)
        temperature = _temperature(arrays) if scores else None
        found[name] = Yardstick(variance or 1.0, temperature)
    return found


def _temperature(parts: Sequence[np.ndarray]) -> float:
    """The lowest temperature of at least one at which answers are as uncertain as they have to be, on average."""
    from scipy.optimize import brentq  # takes as long to import as NumPy

    scores = [part[np.isfinite(part).any(axis=1)].astype(np.float64) for part in parts]
    count = sum(map(len, scores))

    def missing(power: float) -> float:
        shares = [float(entr(softmax(a / 2.0**power, axis=1)).sum()) / math.log(a.shape[1]) for a in scores]
        return _UNCERTAIN * count - math.fsum(shares)

    if not count or missing(0.0) <= 0.0 or not missing(_HOTTEST) < 0.0:  # the last where most is masked, or NaN
        return 1.0
    return float(2.0 ** brentq(missing, 0.0, _HOTTEST, xtol=1e-3))


def deviation(
    original: Mapping[str, np.ndarray],
    changed: Mapping[str, np.ndarray],
    compared: Mapping[str, Yardstick] | None = None,
) -> float:
    """How far outputs moved relative to their variance, summed over samples and floating-point outputs.

    Scores (rank 2, at least two classes) by T^2 KL(original || changed) at the temperature T of their yardstick, others
    by mean squared error.

    Args:
        original: outputs, batch first.
        changed: the same of another network.
        compared: yardsticks, of samples that are not all that there are; of the original's outputs unless given.
    """
    compared = compared if compared is not None else yardsticks([original])
    total = 0.0
    for name, a in original.items():
        b = changed[name]
        if a.dtype.kind != "f" or a.shape != b.shape or not a.size:
            continue
        known = np.isfinite(a)  # masked scores are minus infinity
        if not np.isfinite(b[known]).all():
            return float("inf")
        heat = compared[name].temperature
        if heat is not None:
            with np.errstate(invalid="ignore"):  # where everything is masked
                p, q = (log_softmax(x.astype(np.float64) / heat, axis=1)[known] for x in (a, b))
            moved = heat**2 * float((np.exp(p) * (p - q)).sum())
        else:
            gap = np.subtract(a[known], b[known], dtype=np.float64)
            moved = float(np.square(gap).sum()) / a.size * len(a)
        total += moved / compared[name].variance
    return total


def unsquashed(graph: Graph, output: str) -> str:
    """What an output is made of by a softmax or a sigmoid, or by a decision that shows no small change; else itself."""
    name = found = output
    while (node := graph.producer.get(name)) is not None:
        read = [n for n in node.inputs if n not in graph.computed_from_constants and not graph.is_stored(n)]
        ends = node.op in _SQUASHING
        told = ends or node.op in _DECIDING or _is_whole(node) or (node.op in COMPARING and len(read) == 1)
        if not (told or node.op in (*_MOVING, "Cast")) or not read or read[0] not in graph.producer:
            break
        name = read[0]
        found = name if told else found
        if ends:
            break
    return found


def _is_whole(node: Node) -> bool:
    """Whether a node makes whole numbers, or yes and no, of others."""
    return node.op == "Cast" and node.attributes["to"] not in FLOATS
