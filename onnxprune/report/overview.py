"""What `onnxprune inspect` tells: the groups of a model, their share of the work, what stays and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.costs import CostModel
from onnxprune.report import FrozenEntry


@dataclass(frozen=True)
class GroupOverview:
    """A group; ``macs`` is the share of the model's MACs in layers that get cheaper as the group shrinks."""

    name: str
    units: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    macs: float


@dataclass(frozen=True)
class Overview:
    """A model before any data is looked at. ``reachable`` is the largest speed-up in MACs."""

    macs: int
    prunable_macs: float
    reachable: float
    groups: tuple[GroupOverview, ...]
    frozen: tuple[FrozenEntry, ...]


def overview(analysis: Analysis, reachable: float) -> Overview:
    """Put together what the analysis found."""
    full = np.array([info.units for info in analysis.groups])
    each = CostModel(analysis).per_term(full)
    total = float(each.sum()) or 1.0
    groups = []
    for info in analysis.groups:
        axes = {(axis.tensor, axis.axis) for axis in info.group.axes}
        touched = [any(axis in axes for axis in term.axes) for term in analysis.terms]
        share = float(each[np.array(touched, bool)].sum()) / total
        groups.append(GroupOverview(info.name, info.units, info.producers, info.consumers, share))
    return Overview(round(analysis.macs), analysis.prunable_macs, reachable, tuple(groups), frozen_entries(analysis))


def frozen_entries(analysis: Analysis) -> tuple[FrozenEntry, ...]:
    """What stays, the places that hold back most first."""
    return tuple(
        FrozenEntry(
            f.reason, f.node, f.op, f.tensor, f.axis, f.channels, f.layers, f.macs, rule=f.rule, remedy=f.remedy
        )
        for f in sorted(analysis.frozen, key=lambda f: -f.macs)
    )
