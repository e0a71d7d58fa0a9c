"""The layer that gives scores: which one that is, and what is gained by fitting its answers."""

from __future__ import annotations

import numpy as np
import pytest
from builder import Builder, analysed
from scipy.special import log_softmax

from onnxprune.parallel import workers
from onnxprune.readers import find_readers
from onnxprune.reconstruct import Fit, fit
from onnxprune.scores import Scored, gives_scores, sharpen
from onnxprune.statistics import Sums
from onnxprune.surroundings import look_behind

CLASSES, COLUMNS = 6, 12


def features(g: Builder) -> str:
    x = g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 8))
    return g.GlobalAveragePool(g.Relu(g.conv(x, 10)))


HEADS = {
    "gemm": (lambda g: g.gemm(g.Flatten(features(g)), 5, name="head"), True),
    "softmax": (lambda g: g.Softmax(g.gemm(g.Flatten(features(g)), 5, name="head"), axis=1), True),
    "class": (lambda g: g.ArgMax(g.gemm(g.Flatten(features(g)), 5, name="head"), axis=1), True),
    "marks": (lambda g: g.Less(g.const(0.5), g.gemm(g.Flatten(features(g)), 5, name="head")), False),
    "bias": (lambda g: g.Add(g.MatMul(g.Flatten(features(g)), g.weight(10, 5), name="head"), g.weight(5)), True),
    "conv": (lambda g: g.Flatten(g.conv(features(g), 5, 1, name="head")), True),
    "sigmoid": (lambda g: g.Sigmoid(g.gemm(g.Flatten(features(g)), 5, name="head")), False),
    "limited": (lambda g: g.Relu(g.gemm(g.Flatten(features(g)), 5, name="head")), False),
    "one": (lambda g: g.gemm(g.Flatten(features(g)), 1, name="head"), False),
    "sum": (lambda g: g.Add(g.gemm(g.Flatten(y := features(g)), 10, name="head"), g.Flatten(y)), False),
    "positions": (lambda g: g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 6, 6]), 8)), 5, name="head"), False),
}


@pytest.mark.parametrize("name", HEADS)
def test_scores_are_outputs_of_one_row_for_a_sample(name: str) -> None:
    g = Builder()
    make, expected = HEADS[name]
    analysis = analysed(g.model(make(g)))[0]
    (reader,) = (r for r in find_readers(analysis) if r.layer.node.label == "head")
    available = {*analysis.graph.producer, *(spec.name for spec in analysis.graph.inputs)}
    assert gives_scores(analysis, reader, look_behind(analysis.graph, reader, available)) == expected


class Head:
    """A layer that lost a third of its columns, which the others do not quite make up for."""

    def __init__(self, samples: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.x = np.maximum(rng.standard_normal((samples + 2000, COLUMNS)) @ rng.standard_normal((COLUMNS, COLUMNS)), 0)
        self.x = np.concatenate([self.x, np.ones((len(self.x), 1))], axis=1).astype(np.float32)
        self.weights = rng.standard_normal((COLUMNS + 1, CLASSES))
        self.shift = rng.standard_normal(CLASSES).astype(np.float32)
        self.kept = np.arange(COLUMNS // 3, COLUMNS + 1)
        self.count = samples

    def fitted(self) -> tuple[Fit, Fit]:
        """By least squares, and sharpened; checked to leave removed columns alone."""
        folds, sides = [], []
        for k in range(2):
            rows = self.x[k : self.count : 2]
            sums, side = Sums(COLUMNS + 1, CLASSES), Scored(self.shift, self.count)
            sums.add(rows, (rows @ self.weights).astype(np.float32))
            for part in np.array_split(np.arange(len(rows)), 3):
                side.add(2 * part + k, rows[part], (rows[part] @ self.weights).astype(np.float32))
            folds.append(sums.statistics)
            sides.append(side)
        start = fit(folds, self.kept, self.weights)
        halves = [fit([fold], self.kept, self.weights, [start.ridge]) for fold in folds]
        with workers(1) as spread:
            found = sharpen(start, halves, sides, self.kept, spread)
        assert not found.weights[: self.kept[0]].any()
        return start, found

    def lost(self, found: Fit) -> tuple[float, float]:
        """Divergence and squared error on samples that nothing was fitted to."""
        x = self.x[self.count :]
        s, t = (x @ w + self.shift for w in (self.weights, found.weights))
        p, q = (log_softmax(scores, axis=1) for scores in (s, t))
        return float((np.exp(p) * (p - q)).sum(axis=1).mean()), float(np.square(s - t).mean())


@pytest.mark.parametrize("seed", range(3))
def test_answers_come_nearer_and_scores_go_little_further(seed: int) -> None:
    head = Head(2000, seed)
    start, found = head.fitted()
    before, after = head.lost(start), head.lost(found)
    assert after[0] < 0.97 * before[0]
    assert after[1] < 1.06 * before[1]
    assert found.error == pytest.approx(start.error * after[1] / before[1], rel=0.05)


def test_too_few_samples_are_not_believed() -> None:
    """Samples that were not fitted to say when to stop: a fit to as few of them as there are columns gains nothing."""
    for seed in range(5):
        head = Head(2 * COLUMNS, seed)
        start, found = head.fitted()
        assert head.lost(found)[0] < 1.05 * head.lost(start)[0]


@pytest.mark.parametrize("share", [1, 2, 3, 6])
def test_of_many_samples_some_of_every_fold_are_kept(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(2000)
    monkeypatch.setattr("onnxprune.scores._BYTES", 4 * head.count * (COLUMNS + 1 + CLASSES) // share)
    start, found = head.fitted()
    assert head.lost(found)[0] < head.lost(start)[0]


def test_nothing_taken_in_changes_nothing() -> None:
    start = Fit(np.ones((COLUMNS + 1, CLASSES)), 1e-3, 0.1)
    empty = [Scored(np.zeros(CLASSES), 10) for _ in range(2)]
    with workers(1) as spread:
        assert sharpen(start, [start, start], empty, np.arange(COLUMNS), spread) is start
