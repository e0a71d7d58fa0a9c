"""Mirror images of few images."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder

from onnxprune import prune
from onnxprune.data import InputSpec, load_calibration
from onnxprune.mirror import mirror_axes
from onnxprune.progress import Progress
from onnxprune.report import text

RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((40, 3, 8, 8)).astype(np.float32)
IMAGES += 3.0 * RNG.standard_normal((40, 3, 1, 1)).astype(np.float32)


def network(sides: bool, layout: str = "NCHW", rank: int = 2) -> onnx.ModelProto:
    """Pointwise layers; with ``sides``, what the network says of an image is how its left differs from its right."""
    g = Builder(seed=2)
    x = g.input("x", ["n", 3, 8, 8] if layout == "NCHW" else ["n", 8, 8, 3])
    x = x if layout == "NCHW" else g.Transpose(x, perm=[0, 3, 1, 2])
    x = g.Relu(g.conv(g.Relu(g.conv(x, 12, 1)), 8, 1))
    if sides:
        x = g.Mul(x, g.const(np.linspace(-1, 1, 8).astype(np.float32)))
    x = g.conv(x, 4, 1)
    return g.model(x if rank == 4 else g.Flatten(g.GlobalAveragePool(x)))


def axes(model: onnx.ModelProto, images: np.ndarray = IMAGES) -> dict[str, int]:
    shape = tuple(d.dim_value or None for d in model.graph.input[0].type.tensor_type.shape.dim)
    specs = [InputSpec("x", shape, np.dtype(np.float32))]
    return mirror_axes(specs, load_calibration(images, specs), RUNTIME.session(model), Progress())


def test_a_network_that_knows_no_sides_may_be_shown_mirror_images() -> None:
    assert axes(network(False)) == {"x": 3}
    assert axes(network(False, "NHWC"), IMAGES.transpose(0, 2, 3, 1).copy()) == {"x": 2}


def test_an_answer_that_is_an_image_is_turned_round_with_it() -> None:
    assert axes(network(False, rank=4)) == {"x": 3}


def test_a_network_that_tells_left_from_right_is_not_shown_any() -> None:
    assert axes(network(True)) == {}
    assert axes(network(True, rank=4), RNG.standard_normal((40, 3, 8, 8)).astype(np.float32)) == {}


def test_a_network_that_answers_all_images_alike_says_nothing_about_mirror_images() -> None:
    assert axes(network(False), np.repeat(IMAGES[:1], 5, axis=0)) == {}


def test_what_does_not_run_has_no_mirror_images() -> None:
    g = Builder()
    x = g.Reshape(g.conv(g.input("x", ["n", 3, 8, 8]), 4), g.const(np.array([-1, 4 * 8 * 8 * 3])))
    assert axes(g.model(x)) == {}


def test_mirror_images_are_as_far_from_the_images_as_parts_need_that_are_judged_on_each_other() -> None:
    specs = [InputSpec("x", (None, 3, 8, 8), np.dtype(np.float32)), InputSpec("y", (None, 2), np.dtype(np.float32))]
    data = load_calibration({"x": IMAGES[:27], "y": np.arange(54, dtype=np.float32).reshape(27, 2)}, specs)
    twice = data.mirrored({"x": 3}, 10)
    assert len(twice) == 47
    for record in range(20):
        one, two = data.feeds([record]), twice.feeds([record + 20])
        assert np.array_equal(one["x"][..., ::-1], two["x"])
        assert np.array_equal(one["y"], two["y"])
    for record in range(27):
        here = record if record < 20 else record + 20
        assert np.array_equal(data.feeds([record])["x"], twice.feeds([here])["x"])
    rest = data.split(7)
    both = rest[0].mirrored({"x": 3}, 10).joined(rest[1])
    assert len(both) == 47
    assert np.array_equal(both.feeds([46])["x"], data.feeds([26])["x"])


def test_few_images_are_used_twice_and_the_report_says_so() -> None:
    found = prune(network(False), speedup=1.5, data=IMAGES, threads=1).report
    assert found.data is not None and found.data.mirrored
    assert "--no-mirror" in text.data_lines(found)[0]
    assert '"mirrored": true' in found.to_json()


@pytest.mark.parametrize(
    ("sides", "options"),
    [(True, {}), (False, {"mirror": False}), (False, {"quick": True}), (False, {"select": "l1", "reconstruct": False})],
)
def test_where_mirror_images_have_no_place_the_report_names_none(sides: bool, options: dict[str, Any]) -> None:
    found = prune(network(sides), speedup=1.5, data=IMAGES, threads=1, **options).report
    assert found.data is not None and not found.data.mirrored
    assert text.data_lines(found) == []


@pytest.mark.parametrize(("count", "mirrored"), [(12, False), (30, True)])
def test_too_few_images_to_be_judged_on_each_other_have_no_mirror_images(count: int, mirrored: bool) -> None:
    found = prune(network(False), speedup=1.5, data=IMAGES[:count], threads=1).report
    assert found.data is not None and found.data.mirrored == mirrored


def test_random_numbers_have_no_mirror_images() -> None:
    found = prune(network(False), speedup=1.5, samples=20, threads=1).report
    assert found.data is not None and not found.data.mirrored
