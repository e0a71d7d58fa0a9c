import pytest

from onnxprune.effort import BALANCED, QUICK, THOROUGH


def test_few_samples_are_looked_at_as_thoroughly_as_many() -> None:
    few = BALANCED.of_few
    assert (few.thinned, few.products) == (THOROUGH.thinned, THOROUGH.products)
    assert (few.samples, few.levels) == (BALANCED.samples, BALANCED.levels)
    assert QUICK.of_few is QUICK


@pytest.mark.parametrize(
    ("samples", "groups", "expected"),
    [(2500, 54, 96), (2500, 5, 256), (100, 54, 50), (1, 3, 0)],
    ids=str,
)
def test_damage_is_measured_on_a_part_of_the_samples(samples: int, groups: int, expected: int) -> None:
    assert BALANCED.damage_samples(samples, groups) == expected


def test_damage_is_measured_on_fewer_samples_where_there_are_few() -> None:
    assert BALANCED.of_few.damage_samples(400, 34) == 48
    assert BALANCED.of_few.damage_samples(800, 5) == 240
