"""The notation: reading, printing, binding to shapes, and factoring reshapes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxprune.axes import NotationError, bind, factor, parse


@pytest.mark.parametrize(
    "text",
    [
        "n (g c) *, (g o) c *, (g o) -> n (g o) *",
        "n c *, c, c, c, c -> n c *",
        "m k, n k, n -> m n",
        "n (g !c) * -> n (g !c) *",
        "b (r s c) h w -> b c (h r) (w s)",
        "a0 @ a2, a0 @ a2 -> a0 @ a2",
        "a0 !a1 -> a0 1",
        "m (~h ~k), (~h ~k) n -> m n",
        "*, * -> *",
        " -> a0",
        "a0,  -> a0",
    ],
)
def test_a_relation_prints_as_it_was_written(text: str) -> None:
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n c", "expected 'inputs -> outputs'"),
        ("n -> c -> n", "expected 'inputs -> outputs'"),
        ("n (g c -> n", "unbalanced '('"),
        ("n g) -> n", "unbalanced ')'"),
        ("n (g *) -> n", "'*' within parentheses"),
        ("n * c * -> n", "more than one '*'"),
        ("n C -> n", "cannot read"),
        ("n (g (c o)) -> n", "nested"),
        ("n () -> n", "empty parentheses"),
    ],
)
def test_what_is_not_in_the_notation_is_refused(text: str, message: str) -> None:
    with pytest.raises(NotationError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "ins", "outs", "given_sizes", "sizes"),
    [
        (
            "n (g c) *, (g o) c * -> n (g o) *",
            [(2, 8, 5), (6, 4, 3)],
            [(2, 6, 3)],
            {"g": 2},
            {"n": 2, "g": 2, "c": 4, "o": 3},
        ),
        (
            "n (g c) *, (g o) c * -> n (g o) *",
            [(2, 8, 5), (6, 4, 3)],
            [(2, 6, 3)],
            {},
            {"n": 2, "g": 2, "c": 4, "o": 3},
        ),
        ("a (b c) -> (a b) c", [(2, 6)], [(4, 3)], {}, {"a": 2, "b": 2, "c": 3}),
        ("* -> *", [(2, 3)], [(7,)], {}, {}),
        ("m k, n k, n -> m n", [(2, 3), (4, 3), (4,)], [(2, 4)], {}, {"m": 2, "k": 3, "n": 4}),
        ("a, b -> a", [(3,), None], [(3,)], {}, {"a": 3}),
    ],
)
def test_letters_get_their_sizes(text, ins, outs, given_sizes, sizes) -> None:
    assert bind(parse(text), ins, outs, given_sizes).sizes == sizes


@pytest.mark.parametrize(
    ("text", "ins", "outs", "given_sizes", "message"),
    [
        ("m k, n k -> m n", [(2, 3), (4, 5)], [(2, 4)], {}, "expected"),
        ("n (g c) -> n (g c)", [(2, 8)], [(2, 8)], {}, "cannot be told apart"),
        ("n (g c) -> n (g c)", [(2, 8)], [(2, 8)], {"g": 3}, "not a multiple"),
        ("n c -> n c", [(2, 8, 1)], [(2, 8, 1)], {}, "does not fit a tensor of rank 3"),
        ("n c h * -> n", [(2, 8)], [(2,)], {}, "does not fit a tensor of rank 2"),
    ],
)
def test_shapes_that_contradict_a_relation_are_refused(text, ins, outs, given_sizes, message) -> None:
    with pytest.raises(NotationError) as caught:
        bind(parse(text), ins, outs, given_sizes)
    assert message in str(caught.value)


def test_binding_tells_claimed_from_unclaimed_and_mixed() -> None:
    bound = bind(parse("n !c *, 1 @ -> n c *"), [(2, 3, 5), (1, 4), (9,)], [(2, 3, 5)])
    flags = [[(a.letters, a.claimed, bool(a.mixed), a.mapped) for a in operand] for operand in bound.inputs]
    assert flags == [
        [(("n",), True, False, False), (("c",), True, True, False), ((), False, False, False)],
        [((), False, False, False), ((), True, False, True)],
        [((), False, False, False)],  # an operand that the relation does not name is unclaimed
    ]


def test_letters_of_size_one_are_dropped() -> None:
    bound = bind(parse("n (g !c) -> n (g c)"), [(1, 4)], [(1, 4)], {"g": 4})
    assert [(a.letters, set(a.mixed)) for a in bound.inputs[0]] == [((), set()), (("g",), set())]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([[2], [12], [5]], [[2], [3], [20]], ("a0 (a1 a2) a3", "a0 a1 (a2 a3)")),
        ([[2], [12]], [[2], [12]], ("a0 a1", "a0 a1")),
        ([[2], [1], [12]], [[2], [12], [1]], ("a0 1 a1", "a0 a1 1")),
        ([[6]], [[2], [3]], ("(a0 a1)", "a0 a1")),
        ([[4], [6]], [[6], [4]], None),  # 4 and 6 share 2, and what is left interleaves
        ([[3], [4]], [[4], [3]], None),
        # with two probes a dynamic axis is followed where it goes at both
        ([[2, 3], [12, 12]], [[2, 3], [4, 4], [3, 3]], ("a0 (a1 a2)", "a0 a1 a2")),
        ([[2, 3], [5, 7], [4, 4]], [[10, 21], [4, 4]], ("a0 a1 a2", "(a0 a1) a2")),
        # at the first probe alone 2x6 -> 3x4 looks like 2 6 -> ... ; at both it is no factoring
        ([[2, 5], [6, 6]], [[2, 3], [6, 10]], None),
        ([[0], [3]], [[0], [3]], None),
        ([], [[1]], ("", "1")),
        ([[1]], [], ("1", "")),
    ],
)
def test_reshapes_are_factored(before, after, expected) -> None:
    assert factor(before, after) == expected


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 6), max_size=5),
    st.lists(st.integers(0, 5), max_size=3),
    st.lists(st.integers(0, 5), max_size=3),
)
def test_a_factored_reshape_moves_every_index_where_it_says(
    factors: list[int], cuts_a: list[int], cuts_b: list[int]
) -> None:
    def grouped(cuts: list[int]) -> list[int]:
        edges = sorted({0, len(factors), *(min(c, len(factors)) for c in cuts)})
        return [math.prod(factors[i:j]) for i, j in itertools.pairwise(edges)]

    before, after = grouped(cuts_a), grouped(cuts_b)
    found = factor([[s] for s in before], [[s] for s in after])
    if found is None:
        return
    bound = bind(parse(f"{found[0]} -> {found[1]}"), [tuple(before)], [tuple(after)], _sizes(found, before, after))
    index = np.arange(math.prod(factors)).reshape(before)
    flat = [[x for axis in side[0] for x in axis.letters] for side in (bound.inputs, bound.outputs)]
    assert flat[0] == flat[1]  # the same letters in the same order: row-major order is kept
    assert math.prod(bound.sizes[x] for x in flat[0]) == index.size


def _sizes(found: tuple[str, str], before: list[int], after: list[int]) -> dict[str, int]:
    """Walk both sides of the factoring together; every letter uses up a common divisor."""
    sides = [parse(f"{text} -> ").inputs[0] for text in found]
    rest = [dict(enumerate(shape)) for shape in (before, after)]
    sizes: dict[str, int] = {}
    places = [[(k, x) for k, axis in enumerate(side) for x in axis.letters] for side in sides]
    for (i, letter), (j, same) in zip(*places, strict=True):
        assert letter == same
        sizes[letter] = math.gcd(rest[0][i], rest[1][j])
        rest[0][i] //= sizes[letter]
        rest[1][j] //= sizes[letter]
    assert all(r == 1 for side in rest for r in side.values())
    return sizes
