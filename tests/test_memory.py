"""Memory: how it is shared out, and that what is computed does not depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import RUNTIME, Builder, run
from click.testing import CliRunner

from onnxprune import memory, options, prune
from onnxprune.analysis import Analysis
from onnxprune.batches import Batches
from onnxprune.cli import cli
from onnxprune.collecting import collect
from onnxprune.errors import InputError
from onnxprune.graph import Graph
from onnxprune.memory import MIB, Room
from onnxprune.probe import probe
from onnxprune.readers import Reader
from onnxprune.runtime import expose, in_slices
from onnxprune.shelf import Shelf


def residual() -> onnx.ModelProto:
    g = Builder(seed=3)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 12, 12]), 8, name="stem"))
    for k in (1, 2):
        x = g.Relu(g.Add(x, g.conv(g.Relu(g.conv(x, 12, name=f"a{k}")), 8, name=f"b{k}")), name=f"sum{k}")
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 5, name="head"))


DATA = np.random.default_rng(0).standard_normal((70, 3, 12, 12)).astype(np.float32)


def test_what_is_left_is_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 100 * MIB)
    room = Room.of(300 * MIB, 40 * MIB)
    left = 160 * MIB
    parts = (room.batch, room.frontier + room.answers, room.rows, room.block)
    assert sum(parts) + 2 * room.block <= left and min(parts) >= left // 8
    assert room.is_short("frontier") and room.is_short("block")
    assert not any(Room.of(1 << 40, 40 * MIB).is_short(p) for p in ("batch", "frontier", "rows", "block"))


def test_the_default_is_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 100 * MIB)
    monkeypatch.setattr(memory, "free", lambda: 600 * MIB)
    assert Room.of(None, 0).limit == 400 * MIB
    assert Room.of(None, 0).block == Room(1 << 40).block > Room.of(400 * MIB, 0).block  # unless asked for
    monkeypatch.setattr(memory, "free", lambda: 0)  # what the user did not ask for is no reason to refuse
    assert Room.of(None, 50 * MIB).limit > 150 * MIB


@pytest.mark.parametrize(("limit", "share"), [(None, 2.0), (1 << 40, 2.0), (300 * MIB, 1.0)])
def test_the_fit_of_blocks_gets_more_where_it_has_a_use_for_it(
    limit: int | None, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never at the expense of the other parts, or of a limit."""
    monkeypatch.setattr(memory, "resident", lambda: 100 * MIB)
    one, two = Room.of(limit, 0), Room.of(limit, 0, 2)
    assert two.block == share * one.block
    assert (two.batch, two.frontier, two.answers, two.rows) == (one.batch, one.frontier, one.answers, one.rows)


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    machine = memory.free(tmp_path)
    assert machine > MIB
    (tmp_path / "memory.max").write_text(f"{3 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{2 * MIB}\n")
    assert memory.free(tmp_path) == MIB


def test_too_little_is_refused_with_what_it_takes() -> None:
    with pytest.raises(InputError, match=r"memory: expected at least \d+MiB \(.*, found 10MiB; try --memory (\d+)MiB"):
        prune(residual(), data=DATA, memory=10 * MIB, threads=1)


def test_a_tensor_that_alone_is_too_large_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "of", lambda *_: Room(300 * MIB, batch=10_000))
    with pytest.raises(InputError, match=r"one sample of .relu\d+. takes 1MiB .* of 300MiB .*; try --memory \d+MiB"):
        prune(residual(), data=DATA, memory=300 * MIB, threads=1)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_the_model_does_not_depend_on_batches_and_files(reconstruct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxprune.batches.TARGET_ROWS", 70 * 30)  # of 144 positions a sample

    def result(room: Room, **options: int) -> object:
        monkeypatch.setattr(Room, "of", lambda *_: room)
        return prune(residual(), data=DATA, threads=1, speedup=1.7, reconstruct=reconstruct, **options)

    whole = result(Room(1 << 40))
    for other in (
        result(Room(1 << 40, batch=200_000, frontier=0, rows=0), memory=1 << 40),
        result(Room(1 << 40), batch_size=7),
    ):
        assert other.plan == whole.plan
        for name, array in values(whole.model).items():
            np.testing.assert_allclose(values(other.model)[name], array, rtol=0, atol=1e-3 * np.abs(array).max())


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def test_what_was_adapted_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "of", lambda *_: Room(512 * MIB, batch=200_000, frontier=1, rows=0, block=99 * MIB))
    found = prune(residual(), data=DATA, threads=1, memory=512 * MIB).report.warnings
    assert any(w.startswith("to stay within 512MiB of memory: batches of ") for w in found)
    assert any("activations in files" in w and "99MiB" in w for w in found)


@pytest.mark.parametrize(("dask", "passes"), [(None, [20]), ("local", [20, 20])], ids=["here", "on a cluster"])
def test_samples_that_add_nothing_are_not_run(
    dask: str | None, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster only sums are collected; what the fits want to know of the original takes a pass of its own."""
    seen = []

    def noted(analysis: Analysis, readers: Sequence[Reader], batches: Batches, *rest: Any, **named: Any) -> Any:
        seen.append(sum(map(len, batches.parts)))
        return collect(analysis, readers, batches, *rest, **named)

    monkeypatch.setattr("onnxprune.batches._ENOUGH_SAMPLES", 20)
    monkeypatch.setattr("onnxprune.batches._ENOUGH_PER_COLUMN", 1)
    monkeypatch.setattr("onnxprune.pipeline.collect", noted)
    monkeypatch.setattr("onnxprune.pipeline.collect_on", lambda _, *rest: noted(*rest))
    found = prune(residual(), data=DATA, threads=1, dask=dask).report.warnings
    assert seen == passes
    assert any(w.startswith("sums and fits are of 20 of the 63 samples") for w in found)


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 * MIB), ("1.5GiB", 3 << 29), ("2G", 2 << 30), ("1MB", 10**6), ("4096", 4096)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert options.size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "1XiB", "1.2.3MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    result = CliRunner().invoke(cli, ["m.onnx", "--memory", text])
    assert result.exit_code == 2 and "expected bytes such as 512MiB" in result.output


def test_tensors_in_files_are_the_same_and_go_with_their_last_user() -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "b": np.array([True, False]),
        "c": np.array(["s"], object),
    }
    with Shelf(10) as shelf:
        kept, inside = shelf.put(tensors, 11), shelf.put(tensors, 10)
        files = list(Path(shelf._folder.name).iterdir())
        assert len(files) == 1 and shelf.used_files
        for name, array in tensors.items():
            assert shelf.get(inside)[name] is array
            found = shelf.get(kept)[name]
            assert found.dtype == array.dtype and np.array_equal(found, array)
        part = {"b": kept["b"]}
        del kept
        assert all(f.exists() for f in files) and np.array_equal(shelf.get(part)["b"], tensors["b"])
        del part
        assert not any(f.exists() for f in files)


def test_slices_give_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    names = [o for n in model.graph.node for o in n.output]
    expected = dict(zip(names, run(expose(model, names), {"x": DATA[:2]}), strict=True))
    monkeypatch.setattr("onnxprune.runtime._SLICE_BYTES", 20_000)
    asked = []

    def some(part: tuple[str, ...]) -> list[np.ndarray]:
        asked.append(part)
        found: list[np.ndarray] = RUNTIME.session(expose(model, part)).run(part, {"x": DATA[:2]})
        return found

    found = dict(in_slices({name: array.nbytes for name, array in expected.items()}, some))
    assert list(found) == names == [n for part in asked for n in part]
    held = [[expected[name].nbytes for name in part] for part in asked]
    assert all(sum(sizes) <= 20_000 or len(sizes) == 1 for sizes in held)
    assert len({len(part) for part in asked}) > 1  # small tensors come many at a time
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="other systems than Linux know no such limit")
def test_sizes_that_do_not_fit_into_memory_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pixels with all pixels: at the first sizes that are tried the products take half a GiB."""
    resource = pytest.importorskip("resource")
    g = Builder()
    x = g.Relu(g.conv(g.input("x", ["n", 3, "h", "w"]), 8))
    tokens = g.Reshape(x, g.const([0, 8, -1]))
    scores = g.MatMul(g.Transpose(tokens, perm=[0, 2, 1]), tokens)
    model = g.model(g.MatMul(tokens, g.Softmax(scores, axis=-1)))
    monkeypatch.setattr("onnxprune.memory.free", lambda: 256 << 20)
    before = resource.getrlimit(resource.RLIMIT_AS)
    probes = probe(Graph(model), RUNTIME).probes
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert [max(found.shapes["x"][2:]) for found in probes] == [24, 24]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_said_with_what_to_do() -> None:
    with Shelf(0) as shelf:
        (Path(shelf._folder.name) / "0").symlink_to("/dev/full")
        with pytest.raises(InputError, match=r"expected room for 3MiB of activations.*TMPDIR"):
            shelf.put({"x": np.zeros(3 << 18, np.float32)}, 3 << 20)
