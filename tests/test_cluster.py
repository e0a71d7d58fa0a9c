"""The collecting pass on a real Dask cluster: the sums of one process, whatever happens to its workers."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, analysed

from onnxprune import prune
from onnxprune.batches import Batches
from onnxprune.cluster import collect_on
from onnxprune.collecting import collect
from onnxprune.data import load_calibration
from onnxprune.errors import InputError
from onnxprune.progress import Progress
from onnxprune.readers import find_readers

SAMPLES = 96


def case() -> tuple[Any, Any, Batches]:
    g = Builder(seed=1)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 10, 10]), 8, name="a"))
    x = g.Relu(g.conv(g.Relu(g.conv(x, 6, name="b")), 8, group=2, name="c"))
    analysis = analysed(g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head")))[0]
    x = np.random.default_rng(0).standard_normal((SAMPLES, 3, 10, 10)).astype(np.float32)
    return analysis, find_readers(analysis), Batches(load_calibration(x, analysis.graph.inputs), 8, 0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pytest.importorskip("distributed", reason="Dask is not installed")
    from distributed import LocalCluster

    with pytest.MonkeyPatch.context() as patch:  # workers are new processes
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent.parent), *sys.path]))
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as found:
            yield found


class Count(Progress):
    samples = 0

    def advance(self, steps: int = 1) -> None:
        self.samples += steps


def assert_same(cluster: Any, batches: Batches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.batches.TARGET_ROWS", 20 * SAMPLES)  # fewer positions than there are
    monkeypatch.setattr("onnxprune.batches.ROWS_PER_COLUMN", 1)
    analysis, readers, _ = case()
    expected = collect(analysis, readers, batches, RUNTIME, Progress())
    progress = Count()
    found = collect_on(cluster.scheduler_address, analysis, readers, batches, RUNTIME, progress)
    assert progress.samples == SAMPLES
    for one, two in zip(expected, found, strict=True):
        for a, b in zip(one, two, strict=True):
            assert a.rows == b.rows
            for name in ("gram", "cross", "energy"):
                x, y = getattr(a, name), getattr(b, name)
                np.testing.assert_allclose(y, x, rtol=0, atol=1e-6 * np.abs(x).max())


def set_on_workers(cluster: Any, **values: int) -> None:
    """Sizes that the test has changed here; workers are processes of their own."""
    from distributed import Client

    def change(given: dict[str, int]) -> None:
        from onnxprune import batches

        for name, value in given.items():
            setattr(batches, name, value)

    with Client(cluster) as client:
        client.register_worker_callbacks(lambda: change(values))


@pytest.mark.parametrize("sent", [1 << 28, 1], ids=["one round", "a round for every batch"])
def test_sums_are_those_of_one_process(cluster: Any, sent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_on_workers(cluster, TARGET_ROWS=20 * SAMPLES, ROWS_PER_COLUMN=1)
    monkeypatch.setattr("onnxprune.cluster._SENT", sent)
    assert_same(cluster, case()[2], monkeypatch)


def test_a_worker_that_is_killed_midway_changes_nothing(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import Client

    set_on_workers(cluster, TARGET_ROWS=20 * SAMPLES, ROWS_PER_COLUMN=1)
    with Client(cluster) as client:
        workers = client.run(os.getpid)
    loaded, killed, asked = Batches.loaded, [], []

    def load(self: Batches, which: Sequence[int]) -> Batches:
        asked.append(which)
        if len(asked) == 3:  # others have been given to it by now
            killed.append(next(iter(workers.values())))
            os.kill(killed[0], signal.SIGKILL)
        return loaded(self, which)

    monkeypatch.setattr("onnxprune.cluster._SHARDS", 2)
    monkeypatch.setattr(Batches, "loaded", load)
    assert_same(cluster, case()[2], monkeypatch)
    assert killed and len(asked) > 3


def test_pruning_collects_on_the_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    g = Builder(seed=1)
    x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 10, 10]), 8, name="a")), 8, name="b"))
    model = g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))
    data = np.random.default_rng(0).standard_normal((40, 3, 10, 10)).astype(np.float32)
    one, two = (
        prune(model, data=data, threads=1, speedup=1.5, dask=address) for address in (None, cluster.scheduler_address)
    )
    assert one.plan == two.plan


def test_constants_and_bodies_travel_to_workers(cluster: Any) -> None:
    g = Builder(seed=1)
    x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 10, 10]), 8, name="a")), 8, name="b"))
    pooled = g.GlobalAveragePool(x)
    size = g.node("Constant", value=onnx.numpy_helper.from_array(np.array([0, -1]), "size"))
    given = onnx.helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, None)
    body = onnx.helper.make_graph([onnx.helper.make_node("Identity", [pooled], ["given"])], "as it is", [], [given])
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", [pooled], ["given"])], "other", [], [given])
    positive = g.Greater(g.ReduceMax(pooled, keepdims=0), g.const(np.float32(0.0)))
    chosen = g.If(positive, then_branch=body, else_branch=other)
    model = g.model(g.gemm(g.Reshape(chosen, size), 4, name="head"))
    data = np.random.default_rng(0).standard_normal((40, 3, 10, 10)).astype(np.float32)
    one, two = (
        prune(model, data=data, threads=1, speedup=1.5, quick=True, dask=address)
        for address in (None, cluster.scheduler_address)
    )
    assert one.plan == two.plan


def test_what_is_no_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed")
    monkeypatch.setattr("onnxprune.cluster._SECONDS", 1)
    analysis, readers, batches = case()
    for address, said in (
        ("local:0", "local:N with a number"),
        ("tcp://127.0.0.1:1", "the address of a scheduler"),
        ("", "the address of a scheduler"),  # a variable that is not set
    ):
        with pytest.raises(InputError, match=f"dask: expected {said}"):
            collect_on(address, analysis, readers, batches, RUNTIME, Progress())
    g = Builder()
    model = g.model(g.linear(g.Relu(g.linear(g.input("x", ["n", 6]), 8)), 4))
    data = np.zeros((40, 6), np.float32)
    with pytest.raises(InputError, match="dask: expected the address of a scheduler"):
        prune(model, data=data, threads=1, speedup=1.5, quick=True, dask="")


def test_without_dask_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    analysis, readers, batches = case()
    with pytest.raises(InputError, match=r"expected the package dask.distributed.*pip install 'onnxprune\[dask\]'"):
        collect_on("local", analysis, readers, batches, RUNTIME, Progress())
