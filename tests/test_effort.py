import numpy as np
import pytest
from cases import case_of

from onnxprune.data import load_calibration
from onnxprune.effort import BALANCED, QUICK, THOROUGH
from onnxprune.pipeline import Chooser
from onnxprune.progress import Progress
from onnxprune.runtime import Runtime


def test_few_samples_are_looked_at_as_thoroughly_as_many() -> None:
    few = BALANCED.of_few
    assert (few.thinned, few.twice, few.products) == (THOROUGH.thinned, THOROUGH.twice, THOROUGH.products)
    assert (few.samples, few.levels) == (BALANCED.samples, BALANCED.levels)
    assert (few.again, THOROUGH.of_few.again) == (False, True)
    assert QUICK.of_few is QUICK


@pytest.mark.parametrize(
    ("samples", "groups", "expected"),
    [(2500, 54, 69), (1250, 54, 64), (2500, 5, 256), (100, 54, 50), (1, 3, 0)],
    ids=str,
)
def test_damage_is_measured_on_a_part_of_the_samples(samples: int, groups: int, expected: int) -> None:
    assert BALANCED.damage_samples(samples, groups) == expected


@pytest.mark.parametrize(
    ("samples", "mirrors", "few"),
    [(999, {}, True), (1000, {}, False), (499, {"x": 3}, True), (500, {"x": 3}, False)],
    ids=str,
)
def test_few_samples_are_counted_with_their_mirror_images(samples: int, mirrors: dict[str, int], few: bool) -> None:
    analysis = case_of("chain").analysis
    shape = [d or 1 for d in analysis.graph.inputs[0].shape][1:]
    data = load_calibration(np.zeros((samples, *shape), np.float32), analysis.graph.inputs)
    chooser = Chooser(analysis, data, Runtime(threads=1), Progress(), "greedy", "auto", 0, mirrors=mirrors)
    assert chooser.effort == (BALANCED.of_few if few else BALANCED)
    assert len(chooser.pricing) == chooser.effort.damage_samples(samples, len(analysis.groups))
