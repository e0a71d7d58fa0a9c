"""Where models are run: a provider that does not come up is named, and no session is built again for the same graph."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from builder import Builder

from onnxprune.api import compare, prune
from onnxprune.cli import main
from onnxprune.errors import InputError
from onnxprune.runtime import PROVIDERS, Runtime

X = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)


def network() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="a")), 12, name="b"))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine whose onnxruntime offers TensorRT, which fails, and CUDA, which leaves everything to the CPU."""
    real, seen = ort.InferenceSession.__init__, []

    def init(self: Any, model: Any, options: Any = None, providers: Any = None, **others: Any) -> None:
        seen.append(list(providers))
        if PROVIDERS["tensorrt"] in providers:
            raise RuntimeError("no libraries")
        real(self, model, options, providers=[PROVIDERS["cpu"]], **others)

    monkeypatch.setattr(ort.InferenceSession, "__init__", init)
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    return seen


@pytest.mark.parametrize(("provider", "attempts"), [("cpu", ["cpu"]), ("cuda", ["cuda cpu"]), ("openvino", None)])
def test_a_provider_that_leaves_all_to_the_cpu(
    tried: list[list[str]], provider: str, attempts: list[str] | None
) -> None:
    runtime = Runtime(provider, 1)
    for _ in range(2):
        runtime.session(network())
    for names in attempts or [f"{provider} cpu"]:
        assert [PROVIDERS[name] for name in names.split()] in tried
    said = [f"provider {provider!r} did not come up on this machine: models were run on 'cpu'"]
    assert runtime.fallen == ([] if provider == "cpu" else said)


def test_a_provider_that_fails_gives_way_to_the_next(
    tried: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = Runtime("tensorrt", 1)
    runtime.session(network())
    names = [["tensorrt", "cuda", "cpu"], ["cuda", "cpu"]]
    assert tried == [[PROVIDERS[name] for name in each] for each in names]
    assert len(runtime.fallen) == 1
    assert capsys.readouterr() == ("", "")
    broken = network()
    broken.graph.node[0].op_type = "Nothing"
    with pytest.raises(InputError, match="onnxruntime refuses the model"):
        runtime.session(broken)


def test_the_report_names_a_provider_that_did_not_come_up(tried: list[list[str]]) -> None:
    options: dict[str, Any] = {"data": X, "provider": "tensorrt", "threads": 1}
    found = prune(network(), select="l1", reconstruct=False, **options).report.warnings
    assert sum("'tensorrt' did not come up" in warning for warning in found) == 1
    with pytest.raises(InputError, match=r"'tensorrt' did not come up .* whose time says nothing of it"):
        prune(network(), by="latency", **options)
    assert any("did not come up" in warning for warning in compare(network(), network(), **options).warnings)


def test_the_command_warns_of_it(
    tried: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "m.onnx")
    np.save("x.npy", X)
    assert main(["m.onnx", "--data", "x.npy", "--provider", "cuda", "--select", "l1", "--no-reconstruct"]) == 0
    assert "warning: provider 'cuda' did not come up on this machine" in capsys.readouterr().err


def test_no_whole_model_is_made_ready_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    built: Counter[tuple[bytes, bool]] = Counter()
    real = Runtime.session

    def session(self: Runtime, model: onnx.ModelProto, *, optimise: bool = True, **others: Any) -> Any:
        built[model.SerializeToString(deterministic=True), optimise] += 1
        return real(self, model, optimise=optimise, **others)

    monkeypatch.setattr(Runtime, "session", session)
    model = network()
    result = prune(model, data=X, threads=1, select="l1", reconstruct=False)
    for each in (model, result.model):
        assert built[each.SerializeToString(deterministic=True), True] == 1  # for its latency and its fidelity
    assert built[model.SerializeToString(deterministic=True), False] == 1  # to see whether it runs at all


def test_a_model_that_the_runtime_fails_to_optimise_is_run_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    real = ort.InferenceSession.__init__

    def init(self: Any, model: Any, options: Any = None, **others: Any) -> None:
        if options.graph_optimization_level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL:
            raise RuntimeError("Attempt to replace the existing tensor")
        real(self, model, options, **others)

    monkeypatch.setattr(ort.InferenceSession, "__init__", init)
    report = prune(network(), data=X, select="l1", reconstruct=False, threads=1).report
    assert report.after.latency_ms is not None
    assert sum("fails to optimise the model" in warning for warning in report.warnings) == 1


def test_a_number_of_threads_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="expected a number of threads of at least 0, found -1"):
        Runtime("cpu", -1)
