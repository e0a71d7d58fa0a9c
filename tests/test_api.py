"""The whole way, from a model to one that costs half: on two digits networks and on small graphs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed, run, shapes_of
from onnx import TensorProto, numpy_helper
from test_report import PROMISED

import onnxprune
from onnxprune import fitting
from onnxprune.api import Result, analyze, collect, compare, count_model_macs, prune, prune_family
from onnxprune.cost import params
from onnxprune.data import load_calibration
from onnxprune.errors import InputError, UnreachableTarget
from onnxprune.graph import Graph, read_model
from onnxprune.pipeline import Chooser
from onnxprune.plan import Plan
from onnxprune.report import Report
from onnxprune.rewrite import rewrite
from onnxprune.runtime import expose
from onnxprune.settings import Settings
from onnxprune.tensors import digest

MODELS = Path(__file__).parent.parent / "models"
NAMES = ("digits_cnn", "digits_resnet")
FEW = 40  # samples, where the outcome does not depend on their number


def original(name: str) -> onnx.ModelProto:
    return read_model(MODELS / f"{name}.onnx")


@functools.cache
def pruned(name: str, **options: Any) -> Result:
    """A digits network pruned to half its cost; each way is gone once."""
    return prune(MODELS / f"{name}.onnx", threads=1, **options)


@functools.cache
def test_images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The network's input of its test file, and the labels."""
    with np.load(MODELS / f"{name}.test.npz") as file:
        images, labels = file["images"], file["labels"]
    return images[:, None].astype(np.float32) / 255, labels


def accuracy(model: onnx.ModelProto, name: str) -> float:
    x, labels = test_images(name)
    scores = RUNTIME.session(model).run(None, {"input": x})[0]
    return float((scores.argmax(axis=1) == labels).mean())


test_images.__test__ = False  # type: ignore[attr-defined]

# -------------------------------------------------------------------------------------------------- digits networks


@pytest.mark.parametrize("name", NAMES)
def test_half_the_cost_counted_on_the_written_model(name: str, tmp_path: Path) -> None:
    result = pruned(name)
    result.save(tmp_path / "half.onnx")
    written = onnx.load(tmp_path / "half.onnx")
    onnx.checker.check_model(written, full_check=True)
    macs = count_model_macs(original(name)), count_model_macs(written)
    assert 2.0 <= macs[0] / macs[1] <= 2.1
    assert (result.report.before.macs, result.report.after.macs) == macs
    assert result.report.achieved.macs == macs[0] / macs[1]


@pytest.mark.parametrize("name", NAMES)
def test_hardly_any_accuracy_is_lost(name: str) -> None:
    """Measured: 99.4 % -> 99.4 % and 99.6 % -> 99.5 % of 797 images."""
    assert accuracy(original(name), name) > 0.99
    assert accuracy(pruned(name).model, name) >= accuracy(original(name), name) - 0.015


def test_reconstruction_is_what_keeps_the_accuracy() -> None:
    """Measured with greedy selection: 99.5 % with it, 15 % without."""
    without = pruned("digits_cnn", select="greedy", samples=FEW, reconstruct=False)
    assert accuracy(pruned("digits_cnn").model, "digits_cnn") > accuracy(without.model, "digits_cnn") + 0.3


def test_a_quick_run_fits_every_layer_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured with 40 samples: 96 %; with layers fitted together, 98 %."""

    def never(*_: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(fitting, "fit_block", never)
    monkeypatch.setattr(fitting, "refine", never)
    result = pruned("digits_resnet", select="greedy", samples=FEW, quick=True)
    assert accuracy(result.model, "digits_resnet") > 0.85
    assert result.report.options["quick"] is True


@pytest.mark.parametrize("other", [{"reconstruct": False}, {"stats": "stats.npz"}], ids=str)
@pytest.mark.parametrize("effort", ["quick", "thorough"])
def test_an_effort_is_refused_where_it_changes_nothing(effort: str, other: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"nothing left to be {effort} about"):
        prune(original("digits_cnn"), **{effort: True}, **other)


def test_quick_and_thorough_do_not_go_together() -> None:
    with pytest.raises(InputError, match="expected quick or thorough, found both"):
        prune(original("digits_cnn"), quick=True, thorough=True)


def test_a_thorough_run_looks_at_more() -> None:
    result = pruned("digits_resnet", select="greedy", samples=FEW, thorough=True)
    assert accuracy(result.model, "digits_resnet") > 0.95
    assert result.report.options["thorough"] is True


@pytest.mark.parametrize("select", ["greedy", "lasso", "l1", "random"])
def test_every_selection_is_more_accurate_with_reconstruction(select: str) -> None:
    """Measured with 40 samples: 93 % to 99 % with it, 10 % to 28 % without."""
    results = [pruned("digits_resnet", select=select, samples=FEW, reconstruct=r) for r in (True, False)]
    for result in results:
        assert 2.0 <= count_model_macs(original("digits_resnet")) / count_model_macs(result.model) <= 2.1
    found = [accuracy(r.model, "digits_resnet") for r in results]
    assert found[0] > 0.85
    assert found[0] > found[1] + 0.3


def test_slimming_follows_the_normalisations() -> None:
    result = pruned("digits_resnet", select="slimming", samples=FEW)
    assert 2.0 <= result.report.achieved.macs <= 2.1
    assert accuracy(result.model, "digits_resnet") > 0.9
    with pytest.raises(InputError, match="slimming needs BatchNormalization nodes"):
        pruned("digits_cnn", select="slimming", samples=FEW)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_inputs_and_seed_give_the_same_bytes(name: str) -> None:
    again = prune(original(name), data=MODELS / f"{name}.calib.npz", samples=1, threads=1)
    first = pruned(name, samples=1)
    assert again.model.SerializeToString() == first.model.SerializeToString()
    assert again.plan == first.plan
    assert again.report.hashes == first.report.hashes


def test_another_seed_draws_other_units_at_random() -> None:
    plans = [pruned("digits_cnn", select="random", samples=1, reconstruct=False, seed=s).plan.kept for s in (0, 1)]
    assert plans[0] != plans[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_left_as_it_is(name: str) -> None:
    model = original(name)
    before = model.SerializeToString()
    prune(model, data=MODELS / f"{name}.calib.npz", samples=1, threads=1, select="l1", reconstruct=False)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", NAMES)
def test_inputs_outputs_and_names_stay(name: str) -> None:
    before, after = original(name), pruned(name).model
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    folded = Graph(before).computed_from_constants
    samplers = {n.output[0] for n in after.graph.node if n.op_type == "Gather"} - {
        n.output[0] for n in before.graph.node
    }
    kept = [n.name for n in after.graph.node if n.output[0] not in samplers]
    assert kept == [n.name for n in before.graph.node if n.output[0] not in folded]
    assert after.opset_import == before.opset_import
    assert after.ir_version == before.ir_version


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_is_enough_to_go_by(name: str) -> None:
    result = pruned(name, samples=1)
    assert result.report.data.samples == 1
    assert 2.0 <= result.report.achieved.macs <= 2.1
    assert np.isfinite(run(result.model, {"input": test_images(name)[0][:8]})[0]).all()


# ----------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize("name", NAMES)
def test_the_report_has_the_promised_keys(name: str) -> None:
    result = pruned(name)
    report = json.loads(result.report.to_json())
    for key, kind in PROMISED.items():
        assert isinstance(report[key], kind), key
    assert report["target"] == {"speedup": 2.0, "by": "macs"}
    for side, model in (("before", original(name)), ("after", result.model)):
        assert report[side]["bytes"] == len(model.SerializeToString())
        assert report[side]["params"] == params(model)
        assert 0 < report[side]["latency_ms"]["p10"] <= report[side]["latency_ms"]["median"]
    assert {"name", "units", "kept", "producers", "consumers", "error"} <= set(report["groups"][0])
    assert {"reason", "node", "op", "tensor", "axis", "channels"} <= set(report["frozen"][0])
    assert report["proof"]["max_relative_difference"] < 1e-4
    assert report["fidelity"]["agreement_low"] < report["fidelity"]["agreement"]
    assert report["data"]["samples"] == 300
    assert report["hashes"]["model"] == digest(original(name))
    assert report["hashes"]["pruned"] == digest(result.model)
    assert {"load", "groups", "calibrate", "reconstruct", "prove"} <= set(report["timings"])


@pytest.mark.parametrize("name", NAMES)
def test_the_report_comes_back_from_json(name: str) -> None:
    report = pruned(name).report
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize("name", NAMES)
def test_what_the_report_says_is_removed_is_what_is_missing(name: str) -> None:
    """Without reconstruction the new tensors are the old ones with these positions taken out, and nothing else."""
    result = pruned(name, select="greedy", samples=FEW, reconstruct=False, samplers=False)
    old = {t.name: numpy_helper.to_array(t) for t in original(name).graph.initializer}
    folded = ["logits", *sorted(Graph(original(name)).computed_from_constants - set(old))]
    old |= dict(zip(folded, run(expose(original(name), folded), {"input": test_images(name)[0][:1]}), strict=True))
    new = {t.name: numpy_helper.to_array(t) for t in result.model.graph.initializer}
    touched = 0
    for tensor, array in new.items():
        expected = old[tensor]
        for axis, gone in result.report.removed.get(tensor, {}).items():
            expected = np.delete(expected, gone, axis=axis)
        touched += expected.size != old[tensor].size
        np.testing.assert_array_equal(array, expected)
    assert touched > 10


@pytest.mark.parametrize("name", NAMES)
def test_groups_keep_as_many_as_the_plan_says(name: str) -> None:
    result = pruned(name)
    for entry in result.report.groups:
        kept = result.plan.kept[entry.name]
        assert entry.kept == len(kept) == len(set(kept)) <= entry.units
        assert list(kept) == sorted(kept)
        assert entry.error is not None or entry.kept == entry.units


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_comes_back_from_json_and_gives_the_same_model(name: str) -> None:
    result = pruned(name, select="greedy", samples=FEW, reconstruct=False, samplers=False)
    plan = Plan.from_json(result.plan.to_json())
    assert plan == result.plan
    analysis, copies = analysed(original(name))
    assert rewrite(analysis, plan, copies=copies).SerializeToString() == result.model.SerializeToString()


# ----------------------------------------------------------------------------------------------------------- limits


def chain(
    batch: int | str = "n", names: tuple[str, ...] = ("a", "b", "c"), opset: int = 17, bias: bool = True
) -> onnx.ModelProto:
    g = Builder(opset=opset)
    x = g.input("x", [batch, 3, 8, 8])
    for name in names:
        x = g.Relu(g.conv(x, 16, name=name, bias=bias))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


def small(model: onnx.ModelProto, **options: Any) -> Result:
    """Prune a small model on made-up data."""
    if "data" not in options:
        spec = Graph(model).inputs[0]
        shape = [40 if d is None or k == 0 else d for k, d in enumerate(spec.shape)]
        options["data"] = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return prune(model, threads=1, **options)


def test_an_absurd_speedup_is_refused_with_the_reachable_one() -> None:
    reachable = analyze(chain()).reachable
    with pytest.raises(UnreachableTarget, match=r"1e\+06 cannot be reached; the largest for this model is") as caught:
        small(chain(), speedup=1e6)
    assert caught.value.reachable == pytest.approx(reachable)
    assert caught.value.exit_status == 3
    said = str(caught.value).partition("for this model is ")[2].partition(";")[0]
    assert small(chain(), speedup=float(said), select="l1", reconstruct=False).report.achieved.macs >= float(said)
    assert "an input of the graph" in str(caught.value) or "an output of the graph" in str(caught.value)


def test_where_multiples_hold_a_speedup_it_is_said() -> None:
    with pytest.raises(
        UnreachableTarget, match=r"is 1 at widths that are multiples, .*--round-to .*\((\d+) at any width\)"
    ):
        small(chain(), speedup=2, round_to=64)


def test_best_effort_goes_as_far_as_possible() -> None:
    result = small(chain(), speedup=1e6, best_effort=True)
    assert {len(kept) for kept in result.plan.kept.values()} == {1}
    assert result.report.achieved.macs == pytest.approx(analyze(chain()).reachable, rel=1e-6)
    assert result.report.target.speedup < 1e6 or result.report.warnings or result.report.achieved.macs < 1e6


def test_best_effort_changes_nothing_where_the_speedup_can_be_reached() -> None:
    plans = [small(chain(), best_effort=b, select="l1", reconstruct=False).plan for b in (False, True)]
    assert plans[0] == plans[1]


NOTHING: dict[str, Callable[[Builder], str]] = {
    "one layer": lambda g: g.conv(g.input("x", ["n", 3, 8, 8]), 4),
    "no layer": lambda g: g.Relu(g.input("x", ["n", 3, 8, 8])),
    "a softmax over the channels": lambda g: g.conv(
        g.Softmax(g.conv(g.input("x", ["n", 3, 8, 8]), 4), axis=1), 4, name="last"
    ),
}


@pytest.mark.parametrize("best_effort", [False, True])
@pytest.mark.parametrize("kind", NOTHING)
def test_a_model_with_nothing_to_prune_is_refused(kind: str, best_effort: bool) -> None:
    g = Builder()
    with pytest.raises(UnreachableTarget, match="the largest for this model is 1") as caught:
        small(g.model(NOTHING[kind](g)), best_effort=best_effort)
    assert caught.value.reachable == 1.0


@pytest.mark.parametrize(
    ("options", "narrower"),
    [
        ({"speedup": 3.0}, {"a", "b", "c"}),
        ({"speedup": 1.3, "only": "^a$"}, {"a"}),
        ({"speedup": 2.0, "only": "a|b"}, {"a", "b"}),
        ({"speedup": 2.0, "exclude": "a"}, {"b", "c"}),
        ({"speedup": 1.3, "only": "[abc]", "exclude": "[ac]"}, {"b"}),
    ],
)
def test_only_and_exclude_choose_the_layers(options: dict[str, Any], narrower: set[str]) -> None:
    result = small(chain(), select="l1", reconstruct=False, **options)
    sizes = {n.name: shapes_of(result.model)[n.input[1]][0] for n in result.model.graph.node if n.op_type == "Conv"}
    assert {name for name, size in sizes.items() if size < 16} == narrower
    assert result.report.achieved.macs >= options["speedup"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 1.0}, "expected a speed-up above 1, found 1.0"),
        ({"speedup": float("nan")}, "expected a speed-up above 1, found nan"),
        ({"select": "best"}, "unknown selection 'best'; expected one of greedy, lasso, wanda, l1, slimming, random"),
        ({"samples": 0}, "expected a number of samples of at least 1, found 0"),
        ({"batch_size": 0}, "expected a number of batch size of at least 1, found 0"),
        ({"only": "("}, r"--only '\(' is not a regular expression"),
        ({"exclude": "nowhere"}, "--exclude 'nowhere' matches no layer of the model; its layers are a, b, c, head"),
        ({"only": ["a"]}, "is not a regular expression"),
        ({"provider": "abacus"}, "unknown provider 'abacus'"),
        ({"samples": 8.0}, "expected a whole number as samples, found 8.0"),
        ({"memory": "512MiB"}, "expected a whole number as memory, found '512MiB'"),
        ({"seed": None}, "expected a whole number as seed, found None"),
        ({"round_to": 2.5}, "expected a number of at least 1 or auto for --round-to, found 2.5"),
        ({"max_macs": "5M"}, "expected a number above 0 for --max-macs, found '5M'"),
        ({"preprocessing": {"mean": 0.5}}, "expected an onnxprune.Preprocessing, found dict"),
        ({"data": np.zeros((4, 5, 8, 8), np.float32)}, "calibration data"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(chain(), **options)


def test_numbers_may_be_those_of_numpy(tmp_path: Path) -> None:
    options: dict[str, Any] = {"samples": np.int64(12), "seed": np.int32(1)}
    result = small(chain(), speedup=np.float32(1.5), round_to=np.int64(2), max_params=np.int64(1 << 20), **options)
    assert Report.from_json(result.report.to_json()).target.speedup == 1.5
    data = np.random.default_rng(0).standard_normal((12, 3, 8, 8))
    collect(chain(), data=data, threads=np.int8(1), **options).save(tmp_path / "stats.npz")


@pytest.mark.parametrize("given", [b"", None, 3])
def test_what_is_no_model_is_refused(given: Any) -> None:
    for function in (prune, analyze, collect, functools.partial(compare, chain())):
        with pytest.raises(InputError, match=f"or an onnx.ModelProto, found {type(given).__name__}; try onnx.load"):
            function(given)


def test_a_file_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    result = small(chain(), select="l1", reconstruct=False)
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"exists already; choose another name or overwrite it with force=True"):
        result.save(path)
    assert path.read_text() == "mine"
    result.save(path, force=True)
    assert onnx.load(path) == result.model
    with pytest.raises(InputError, match=r"there is no folder .*nowhere; make it"):
        result.save(tmp_path / "nowhere" / "model.onnx")


# ---------------------------------------------------------------------------------------------------- kinds of graph


def test_random_data_gives_a_warning() -> None:
    result = prune(chain(), threads=1)
    assert result.report.data.is_random
    assert any("random" in warning for warning in result.report.warnings)
    assert result.report.fidelity.is_random
    assert not small(chain()).report.data.is_random


def test_a_model_that_insists_on_single_samples() -> None:
    result = small(chain(batch=1), data=np.random.default_rng(0).standard_normal((30, 3, 8, 8)).astype(np.float32))
    assert result.report.achieved.macs >= 2.0
    assert [d.dim_value for d in result.model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert result.report.data.samples == 30


def images_last() -> onnx.ModelProto:
    """[n, h, w, c] outside, [n, c, h, w] inside."""
    g = Builder()
    x = g.Transpose(g.input("x", ["n", 8, 8, 3]), perm=[0, 3, 1, 2])
    g.inputs[0], known = onnx.helper.make_tensor_value_info("x", 1, ["n", 8, 8, 3]), x
    x = g.node("Conv", known, g.weight(16, 3, 3, 3), g.weight(16), pads=[1] * 4, name="a")
    x = g.Transpose(g.Relu(x), perm=[0, 2, 3, 1])
    x = g.Add(x, g.const(np.full(16, 0.1)))
    x = g.Transpose(x, perm=[0, 3, 1, 2])
    x = g.node("Conv", x, g.weight(16, 16, 3, 3), g.weight(16), pads=[1] * 4, name="b")
    x = g.node("Conv", g.Relu(x), g.weight(4, 16, 1, 1), g.weight(4), name="c")
    return g.model(g.Transpose(x, perm=[0, 2, 3, 1]))


def flattened() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="a"))
    x = g.Flatten(g.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2]))
    x = g.Relu(g.node("Gemm", x, g.weight(24, 192), g.weight(24), transB=1, name="b"))
    return g.model(g.gemm(x, 4, name="head"))


def without_biases() -> onnx.ModelProto:
    return chain(bias=False)


def perceptron() -> onnx.ModelProto:
    g = Builder()
    x = g.input("x", ["n", 5, 12])
    return g.model(g.linear(g.Relu(g.linear(g.Relu(g.linear(x, 20)), 24)), 6))


def upsampling() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="a"))
    x = g.Relu(g.ConvTranspose(x, g.weight(12, 10, 2, 2), g.weight(10), strides=[2, 2], name="b"))
    return g.model(g.conv(x, 3, name="c"))


def separable() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="a"))
    for k in range(2):
        wide = g.Relu(g.batch_norm(g.conv(x, 24, k=1, name=f"up{k}", bias=False)))
        wide = g.Relu(g.batch_norm(g.conv(wide, 24, group=24, name=f"depth{k}", bias=False)))
        x = g.Add(x, g.batch_norm(g.conv(wide, 12, k=1, name=f"down{k}", bias=False)))
    return g.model(g.conv(x, 4, name="last"))


KINDS = (images_last, flattened, without_biases, perceptron, upsampling, separable)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("select", ["greedy", "lasso"])
def test_kinds_of_graphs_are_pruned_and_fitted(kind: Callable[[], onnx.ModelProto], select: str) -> None:
    """On the data that it was fitted to, a fitted model is nearer to the original than a sliced one."""
    model = kind()
    spec = Graph(model).inputs[0]
    x = np.random.default_rng(1).standard_normal((60, *spec.shape[1:])).astype(np.float32)
    results = [small(model, data=x, select=select, reconstruct=r) for r in (True, False)]
    expected = run(model, {spec.name: x})[0]
    errors = []
    for result in results:
        assert count_model_macs(model) / count_model_macs(result.model) == result.report.achieved.macs >= 2.0
        onnx.checker.check_model(result.model, full_check=True)
        found = run(result.model, {spec.name: x})[0]
        errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
    assert errors[0] < errors[1]


def test_members_of_a_family_are_those_that_are_made_alone() -> None:
    data = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    speedups, options = (3.0, 1.5), {"data": data, "threads": 1}
    family = prune_family(separable(), speedups, **options)
    for speedup, member in zip(speedups, family, strict=True):
        alone = prune(separable(), speedup=speedup, **options)
        assert member.model.SerializeToString() == alone.model.SerializeToString()
        assert member.plan == alone.plan
        assert member.report.target.speedup == speedup
        assert member.report.groups == alone.report.groups
        assert set(member.report.timings) == set(alone.report.timings)


def test_a_family_collects_once_and_stops_before_that_where_a_member_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = []
    monkeypatch.setattr(Chooser, "collect", lambda self: passes.append(1))
    data = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    with pytest.raises(UnreachableTarget, match=r"a speed-up of 1e\+06 cannot be reached"):
        prune_family(chain(), [2.0, 1e6], data=data, threads=1)
    assert not passes
    options: dict[str, Any] = {"data": data, "threads": 1, "best_effort": True, "reconstruct": False}
    members = prune_family(chain(), [2.0, 1e6], select="l1", **options)
    assert 2.0 <= members[0].report.achieved.macs < 2.2 < members[1].report.achieved.macs
    assert any("asked for 1e+06x" in warning for warning in members[1].report.warnings)


@pytest.mark.parametrize("speedups", [[], [2.0, 2], [1.0, 2.0], ["2"]])
def test_speedups_that_make_no_family(speedups: list[Any]) -> None:
    with pytest.raises(InputError, match="speed-up"):
        prune_family(chain(), speedups)


def test_what_prune_may_be_told_are_the_settings() -> None:
    parameters = inspect.signature(prune).parameters
    given = {n: p.default for n, p in parameters.items() if n not in ("model", "speedup", "progress")}
    assert given == {field.name: field.default for field in dataclasses.fields(Settings)}


def test_a_bias_is_added_only_where_it_was_fitted() -> None:
    model = without_biases()
    for fitted in (False, True):
        result = small(model, reconstruct=fitted, speedup=4.0)
        cut = {name for g in result.report.groups if g.kept < g.units for name in g.consumers} - {"head"}
        assert cut == {"b", "c"}
        biased = {n.name for n in result.model.graph.node if n.op_type == "Conv" and len(n.input) > 2}
        if fitted:  # the layer in front may be fitted with its reader
            assert cut <= biased <= cut | {"a"}
        else:
            assert not biased


def test_batch_size_does_not_matter_to_the_outcome() -> None:
    x = np.random.default_rng(1).standard_normal((30, 3, 8, 8)).astype(np.float32)
    one, two = (small(chain(), data=x, batch_size=b, reconstruct=False) for b in (3, 64))
    assert one.plan == two.plan


def test_data_in_several_forms_give_the_same_model(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((30, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "m.calib.npz", x=x)
    onnx.save(chain(), tmp_path / "m.onnx")
    options: dict[str, Any] = {"threads": 1, "select": "l1"}
    models = [
        prune(chain(), data=x, **options),
        prune(chain(), data={"x": x}, **options),
        prune(chain(), data=tmp_path / "x.npy", **options),
        prune(tmp_path / "m.onnx", **options),
    ]
    assert len({m.model.SerializeToString() for m in models}) == 1


def test_the_public_names_are_those_of_the_parts() -> None:
    assert onnxprune.prune is prune
    assert onnxprune.Report is Report
    assert all(getattr(onnxprune, name).__name__ == name for name in onnxprune.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_analyze_needs_no_data(name: str) -> None:
    found = analyze(MODELS / f"{name}.onnx")
    assert found.analysis.macs == count_model_macs(original(name))
    assert found.reachable > 100
    assert found.analysis.prunable_macs == 1.0


def test_the_calibration_files_are_preprocessed_as_the_tests_are() -> None:
    spec = Graph(original("digits_cnn")).inputs
    images, _ = test_images("digits_cnn")
    raw = np.load(MODELS / "digits_cnn.test.npz")["images"]
    data = load_calibration({"input": raw}, spec)
    np.testing.assert_allclose(data.feeds([0])["input"][0], images[data._order[0]], atol=1e-6)


def test_a_state_beside_a_batch_is_fed_with_one_sample() -> None:
    g = Builder()
    x = g.Transpose(g.input("x", ["b", "t", 6]), perm=[1, 0, 2])
    state = [g.input(name, [1, "b", 5]) for name in ("h", "c")]
    y, h, c = g.node("LSTM", x, g.weight(1, 20, 6), g.weight(1, 20, 5), "", "", *state, outputs=3, hidden_size=5)
    model = g.model(g.linear(g.Relu(g.linear(g.Squeeze(y, g.const([1])), 16)), 3), h, c)
    result = prune(model, speedup=1.2, select="random", reconstruct=False, best_effort=True, samples=4, threads=1)
    assert result.report.removed


def test_layers_that_are_fitted_together_may_have_readers_far_apart() -> None:
    """What stands behind the first reader is run again too, with whatever that reads."""
    g = Builder(seed=2)
    x = g.input("x", ["n", 3, 8, 8])
    other = g.Relu(g.conv(x, 4, name="other"))
    y = g.Relu(g.conv(x, 12, name="a"))
    z = g.Relu(g.Add(g.conv(y, 4, name="b"), other))  # nobody needs the other one any more
    z = g.conv(g.Relu(g.conv(z, 8, name="c")), 4, name="d")
    z = g.Relu(g.Add(z, g.conv(y, 4, name="e")))
    model = g.model(g.gemm(g.Flatten(g.GlobalAveragePool(z)), 3, name="head"))
    data = np.random.default_rng(0).standard_normal((80, 3, 8, 8)).astype(np.float32)
    fitted, sliced = (small(model, data=data, reconstruct=r, samplers=False) for r in (True, False))
    expected = run(model, {"x": data})[0]
    errors = [np.linalg.norm(run(r.model, {"x": data})[0] - expected) for r in (fitted, sliced)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("budget", ["uniform", "papers"])
def test_budgets_without_measurements_meet_the_speed_up(budget: str) -> None:
    result = pruned("digits_resnet", select="wanda", budget=budget, samples=FEW)
    assert 2.0 <= result.report.achieved.macs <= 2.1
    assert "sensitivity" not in result.report.timings
    assert result.report.options["budget"] == budget


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(InputError, match="unknown budget 'best'; expected one of auto, uniform, papers"):
        pruned("digits_resnet", budget="best", samples=FEW)


def test_a_sequence_may_be_shorter_than_a_batch() -> None:
    """Time comes first and is pooled away: no tensor has the samples in front."""
    g = Builder()
    x = g.Relu(g.linear(g.Relu(g.linear(g.input("x", ["t", "n", 10]), 24)), 16))
    x = g.ReduceMax(x, axes=[0], keepdims=0)
    result = prune(g.model(g.linear(g.Relu(g.linear(x, 12)), 3)), speedup=1.5, threads=1)
    assert result.report.data.samples > 12 and result.report.achieved.macs >= 1.5


def test_a_table_that_is_also_read_turned_is_named_once() -> None:
    g = Builder()
    table = g.weight(30, 16, name="table")
    h = g.Gather(table, g.input("ids", ["n", 7], TensorProto.INT64))
    h = g.Add(h, g.linear(g.Relu(g.MatMul(h, g.weight(16, 24))), 16, bias=False))
    model = g.model(g.MatMul(h, g.Transpose(table, perm=[1, 0], name="turned")))
    report = prune(model, speedup=1.5, select="random", reconstruct=False, samples=4, threads=1).report
    assert set(report.removed["table"]) == {1} and "turned" not in report.removed


def twice(op: str) -> onnx.ModelProto:
    """Two users of one weight, in branches that have nothing else in common."""
    g = Builder()
    if op == "Gather":
        table = g.weight(30, 16, name="shared")
        ends = [g.Gather(table, g.input(name, ["n", 7], TensorProto.INT64)) for name in ("one", "two")]
    else:
        weights = g.weight(1, 48, 5, name="shared"), g.weight(1, 48, 16), g.weight(1, 96)
        sides = [g.input(name, [7, "n", 5]) for name in ("one", "two")]
        ends = [g.Squeeze(g.GRU(x, *weights, hidden_size=16), g.const([1])) for x in sides]
    return g.model(*(g.MatMul(g.Relu(g.MatMul(end, g.weight(16, 24))), g.weight(24, 3)) for end in ends))


@pytest.mark.parametrize("op", ["Gather", "GRU"])
def test_a_weight_that_two_operators_share_is_cut_alike_and_named(op: str) -> None:
    result = prune(twice(op), speedup=1.5, select="random", reconstruct=False, samples=4, threads=1)
    new = shapes_of(result.model)
    gone = len(result.report.removed["shared"][1])
    assert gone > 0 and new["shared"][1] == (16 if op == "Gather" else 48) - gone
    assert not any(name.startswith("shared_") for name in new)
