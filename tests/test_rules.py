"""One law (`law`) for every row of the table, on the cases of `rule_cases`."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from law import CASE_OPS, CASES, EXAMPLES, Call, Draw, check
from rule_cases import contraction, movement, normalisation, picking, pointwise

from onnxprune.axes import Refusal
from onnxprune.rules import TABLE
from onnxprune.rules.base import OpView, Row, describe, row_for

FAMILIES = (contraction, movement, normalisation, picking, pointwise)  # whose import registers their cases


@pytest.mark.parametrize("name", CASES)
def test_the_law_holds(name: str) -> None:
    # the largest of three values is seldom the one taken out: these need more draws until the law fails
    check(name, CASES[name], 24 if name in ("ReduceMax", "ReduceMin") else EXAMPLES)


WRONG = {
    "a convolution whose groups are read across": ("Conv-grouped", "n (g c) *, (c o) g *, (c o) -> n (c o) *"),
    "a normalised axis that is not marked": ("LayerNormalization", "* c, c, c -> * c"),
    "a softmax over an axis that is not marked": ("Softmax-fixed", "a b c -> a b c"),
    "a product over an axis that is not marked": ("ReduceProd-fixed", "a b c -> a 1 c"),
    "an axis that is marked for nothing": ("Relu-fixed", "a !b c -> a b c"),
    "a transpose that turns nothing": ("Transpose-fixed", "a b c -> a c b"),
    "a matrix whose rows are its columns": ("Gemm-fixed", "m k, k n, n -> m n"),
    "activations that are summed over": ("MatMul-activations", "* h m k, * k n -> * h m n"),
    "channels of the wrong order": ("DepthToSpace-fixed", "b (c r s) h w -> b c (h r) (w s)"),
}
FIXED: dict[str, Callable[[Draw], Call]] = {
    "Softmax-fixed": lambda d: Call("Softmax", [d.floats(2, 3, 4)], {"axis": 1}),
    "ReduceProd-fixed": lambda d: Call("ReduceProd", [d.floats(2, 3, 4)], {"axes": [1]}),
    "Relu-fixed": lambda d: Call("Relu", [d.floats(2, 3, 4)]),
    "Transpose-fixed": lambda d: Call("Transpose", [d.floats(2, 3, 3)], {"perm": [0, 1, 2]}),
    "Gemm-fixed": lambda d: Call("Gemm", [d.floats(2, 3), d.floats(3, 3), d.floats(3)], {"transB": 1}, (1, 2)),
    "MatMul-activations": lambda d: Call("MatMul", [d.floats(2, 2, 3), d.floats(2, 3, 2)]),
    "DepthToSpace-fixed": lambda d: Call("DepthToSpace", [d.floats(1, 12, 2, 3)], {"blocksize": 2, "mode": "DCR"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_caught(name: str) -> None:
    which, spec = WRONG[name]
    right = FIXED.get(which) or CASES[which]
    found = row_for("", which.split("-")[0], 17)
    assert found is not None
    wrong = Row(spec, repair=found.repair, sizes=found.sizes, weights=found.weights)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        check(name, right, EXAMPLES, wrong)


# rows for which the law says nothing: what they give is not a part of what they are given
NO_LAW = {
    "Constant": "has no input",
    "Loop": "speaks of what a turn gets and gives, beside the loop; whole loops are cut in test_loops",
    "Scan": "speaks of what a turn gets and gives, beside the loop; whole loops are cut in test_loops",
    "Shape": "gives sizes, which change with a cut; the rewrite keeps them right (test_rewrite)",
    "Size": "gives sizes, which change with a cut; the rewrite keeps them right (test_rewrite)",
}


def test_every_row_has_a_case() -> None:
    rows = {key for key, rows in TABLE.items() if not all(isinstance(row.describe, Refusal) for row in rows)}
    assert not {key for key in rows if key[1] not in NO_LAW} - set(CASE_OPS.values())


def test_every_operator_has_a_row_or_a_reason() -> None:
    for schema in onnx.defs.get_all_schemas():
        if schema.domain == "":
            row = row_for("", schema.name, schema.since_version)
            assert row is not None, schema.name
            if isinstance(row.describe, Refusal):
                assert schema.name in row.describe.reason


def test_an_unknown_operator_is_named_with_its_domain() -> None:
    assert describe(OpView("Foo", "acme", 1, {}, (), (), (), ())) == Refusal(
        "no rule for operator acme.Foo", known=False
    )
