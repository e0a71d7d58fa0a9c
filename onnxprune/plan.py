"""The plan: which units of which groups stay. Frozen, printable, replayable from its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.analysis import Analysis
from onnxprune.axes import Refusal
from onnxprune.errors import InputError
from onnxprune.positions import AxisId, Statement


@dataclass(frozen=True)
class Plan:
    """Kept units per group name, sorted; groups that are not named keep everything."""

    model: str  # digest of the model that the plan is for
    kept: Mapping[str, tuple[int, ...]]

    def to_json(self) -> str:
        """The plan as a JSON object."""
        return json.dumps(
            {"schema_version": "1", "model": self.model, "kept": {k: list(v) for k, v in self.kept.items()}}
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan back.

        Raises:
            InputError: the text is not a plan.
        """
        try:
            data = json.loads(text)
            return Plan(str(data["model"]), {str(k): tuple(int(i) for i in v) for k, v in data["kept"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a plan ({error!r}); expected the JSON that onnxprune writes") from error

    def counts(self, analysis: Analysis) -> np.ndarray:
        """Number of kept units per group, in the analysis' order."""
        return np.array([len(self.kept.get(g.name, range(g.units))) for g in analysis.groups], dtype=np.int64)


def removed_positions(analysis: Analysis, plan: Plan) -> dict[AxisId, np.ndarray]:
    """Per axis that loses something, the sorted positions that go.

    Raises:
        InputError: the plan names groups or units that the model does not have.
    """
    names = {g.name for g in analysis.groups}
    for name in plan.kept:
        if name not in names:
            raise InputError(
                f"the plan names a group {name!r} that the model does not have; was it made for another model?"
            )
    found: dict[AxisId, list[np.ndarray]] = {}
    for info in analysis.groups:
        kept = plan.kept.get(info.name)
        if kept is None or len(kept) == info.units:
            continue
        if not kept or min(kept) < 0 or max(kept) >= info.units:
            raise InputError(f"group {info.name!r} has {info.units} units; the plan keeps {list(kept)[:8]}")
        gone = np.setdiff1d(np.arange(info.units), np.asarray(kept))
        for axis in info.group.axes:
            found.setdefault((axis.tensor, axis.axis), []).append(axis.positions[gone].ravel())
    return {axis: np.unique(np.concatenate(parts)) for axis, parts in found.items()}


def approximate_nodes(analysis: Analysis, plan: Plan) -> tuple[int, ...]:
    """Indices of the nodes that take a statistic of fewer channels than in the original."""
    removed = removed_positions(analysis, plan)
    return tuple(
        index
        for index, letters in sorted(analysis.approximate.items())
        if any(_loses(analysis.statements[index], letters, place, gone) for place, gone in removed.items())
    )


def _loses(statement: Statement, letters: frozenset[str], place: AxisId, gone: np.ndarray) -> bool:
    """Whether an axis loses some, and not all, of the positions that differ in one of the letters only."""
    relation = statement.relation
    if isinstance(relation, Refusal):
        return False
    for names, side in ((statement.inputs, relation.inputs), (statement.outputs, relation.outputs)):
        for name, operand in zip(names, side, strict=False):
            if name != place[0] or not letters & set(operand[place[1]].letters):
                continue
            word = operand[place[1]].letters
            mask = np.zeros([relation.sizes[x] for x in word], bool)
            mask.flat[gone] = True
            for letter in letters & set(word):
                along = word.index(letter)
                if (mask.any(along) != mask.all(along)).any():
                    return True
    return False
