"""Tensors outside of the message: mapped, cut, proven and written beside the model; limits that tests can reach."""

from __future__ import annotations

import gc
import json
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from builder import Builder, run
from onnx import TensorProto, helper, numpy_helper

from onnxprune import tensors
from onnxprune.api import analyze, prune, prune_family
from onnxprune.cli import main
from onnxprune.errors import InputError
from onnxprune.graph import read_model

X = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kilobytes in place of gigabytes, and a place for temporary files that can be looked into."""
    monkeypatch.setattr(tensors, "OUTSIDE", 1 << 10)
    monkeypatch.setattr(tensors, "MESSAGE", 1 << 14)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def network() -> onnx.ModelProto:
    g = Builder()
    x = g.Relu(g.batch_norm(g.conv(g.input("x", ["n", 3, 8, 8]), 24)))
    x = g.Add(g.conv(g.Relu(g.conv(x, 32)), 24), x)
    return g.model(g.linear(g.Relu(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 64)), 10))


def saved(folder: Path, **options: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(
        network(), folder / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0, **options
    )
    return folder / "m.onnx"


def same(a: onnx.ModelProto, b: onnx.ModelProto) -> bool:
    left, right = ([tensors.array_of(t) for t in m.graph.initializer] for m in (a, b))
    return all(np.array_equal(x, y) for x, y in zip(left, right, strict=True))


def test_large_tensors_stay_outside_and_small_ones_are_read(tmp_path: Path) -> None:
    model = read_model(saved(tmp_path))
    assert same(model, network())
    for tensor in model.graph.initializer:
        array = tensors.array_of(tensor)
        assert tensors.is_outside(tensor) == (array.nbytes >= tensors.OUTSIDE)
        assert not tensors.is_outside(tensor) or not array.flags.writeable
    assert tensors.size_of(model) == pytest.approx(tensors.size_of(network()), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"reconstruct": False}, {"select": "lasso"}], ids=str)
def test_the_outcome_is_the_same_inside_outside_and_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    outside = prune(saved(tmp_path), data=X, speedup=2, threads=1, **options)
    beyond = prune(network(), data=X, speedup=2, threads=1, **options)
    monkeypatch.setattr(tensors, "MESSAGE", 1 << 30)
    inside = prune(network(), data=X, speedup=2, threads=1, **options)
    assert same(inside.model, outside.model) and same(inside.model, beyond.model)
    assert inside.report.proof == outside.report.proof == beyond.report.proof
    assert inside.report.after.macs == outside.report.after.macs
    assert any(map(tensors.is_outside, outside.model.graph.initializer))


def test_the_files_of_the_original_are_not_overwritten_even_where_every_tensor_is_cut(tmp_path: Path) -> None:
    g = Builder()
    x = g.Relu(g.MatMul(g.input("x", ["n", 16]), g.weight(16, 32)))
    model = g.model(g.MatMul(x, g.weight(32, 16)))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    before = (tmp_path / "weights.bin").read_bytes()
    result = prune(tmp_path / "m.onnx", speedup=2, threads=1)
    result.save(tmp_path / "new.onnx")
    assert (tmp_path / "weights.bin").read_bytes() == before
    assert same(onnx.load(tmp_path / "new.onnx"), result.model)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_written_model_keeps_the_layout(tmp_path: Path, elsewhere: bool) -> None:
    path = saved(tmp_path)
    before = (tmp_path / "weights.bin").read_bytes()
    target = tmp_path / "out" / "m.pruned.onnx" if elsewhere else tmp_path / "m.pruned.onnx"
    target.parent.mkdir(exist_ok=True)
    result = prune(path, data=X, speedup=2, threads=1)
    result.save(target)
    assert (tmp_path / "weights.bin").read_bytes() == before
    name = "weights.bin" if elsewhere else "m.pruned.onnx.data"
    written = onnx.load(target, load_external_data=False)
    places = [
        {e.key: e.value for e in t.external_data}
        for t in written.graph.initializer
        if t.data_location == TensorProto.EXTERNAL
    ]
    assert len(places) >= 4 and {place["location"] for place in places} == {name}
    assert all(int(place["offset"]) % 4096 == 0 and set(place) == {"location", "offset", "length"} for place in places)
    assert same(onnx.load(target), result.model)
    onnx.checker.check_model(str(target))
    found, expected = (run(m, {"x": X[:3]})[0] for m in (onnx.load(target), result.model))
    np.testing.assert_array_equal(found, expected)
    assert sorted(p.name for p in target.parent.iterdir() if p.is_file() and p != path) == sorted(
        {name, target.name} | (set() if elsewhere else {"weights.bin"})
    )
    with pytest.raises(InputError, match="exists already"):
        result.save(target)
    result.save(target, force=True)


def test_members_of_a_family_keep_tensors_of_their_own(tmp_path: Path) -> None:
    path, place = saved(tmp_path / "in"), tmp_path / "temporary"
    (tmp_path / "out").mkdir()
    np.save(tmp_path / "x.npy", X)
    line = ["--data", str(tmp_path / "x.npy"), "--speedup", "1.5,2", "--threads", "1", "-o", str(tmp_path / "out")]
    assert main([str(path), *line]) == 0
    written = [tmp_path / "out" / f"m.pruned-{speedup}x.onnx" for speedup in ("1.5", "2")]
    names = {"weights.bin", f"{written[1].name}.data"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in written} | names
    gc.collect()
    assert not list(place.iterdir())
    family = prune_family(path, [1.5, 2], data=X, threads=1)
    assert all(same(onnx.load(p), member.model) for p, member in zip(written, family, strict=True))
    assert list(place.iterdir())
    kept = family[1]
    del family
    gc.collect()
    assert same(onnx.load(written[1]), kept.model)  # its files are still there
    del kept
    gc.collect()
    assert not list(place.iterdir())


def test_temporary_files_go(tmp_path: Path) -> None:
    path, place = saved(tmp_path), tmp_path / "temporary"
    result = prune(path, data=X, speedup=2, threads=1)
    left = {str(p) for p in place.rglob("*") if p.is_file()}
    entries = [{e.key: e.value for e in t.external_data} for t in result.model.graph.initializer]
    used = {f"{e['basepath']}/{e['location']}" for e in entries if e}
    assert left and left == used - {str(tmp_path / "weights.bin")}
    del result
    gc.collect()
    assert not list(place.iterdir())
    analyze(path)
    with pytest.raises(InputError):
        prune(path, data=X[:, :2], speedup=2, threads=1)
    gc.collect()
    assert not list(place.iterdir())


def test_the_command_line_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path)
    np.save(tmp_path / "x.npy", X)
    arguments = [str(path), "--data", str(tmp_path / "x.npy"), "--threads", "1", "--report", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    size = sum((tmp_path / name).stat().st_size for name in ("m.pruned.onnx", "m.pruned.onnx.data"))
    assert report["after"]["bytes"] == pytest.approx(size, rel=0.6)  # the file aligns every tensor
    assert report["after"]["bytes"] < 0.8 * report["before"]["bytes"]
    assert main(["compare", str(path), str(tmp_path / "m.pruned.onnx"), "--data", str(tmp_path / "x.npy")]) == 0


def test_the_digest_is_that_of_the_values(tmp_path: Path) -> None:
    path = saved(tmp_path)
    one = tensors.digest(read_model(path))
    assert one == tensors.digest(read_model(saved(tmp_path / "other")))
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert tensors.digest(read_model(path)) != one


# ----------------------------------------------------------------------------------------------- refusals


def _move_out(folder: Path) -> str:
    (folder / "weights.bin").rename(folder.parent / "weights.bin")
    return "../weights.bin"


def _absolute(folder: Path) -> str:
    return str(folder / "weights.bin")


def _link(folder: Path) -> str:
    (folder / "weights.bin").rename(folder.parent / "weights.bin")
    (folder / "weights.bin").symlink_to(folder.parent / "weights.bin")
    return "weights.bin"


def _linked_folder(folder: Path) -> str:
    (folder.parent / "far").mkdir()
    (folder / "weights.bin").rename(folder.parent / "far" / "weights.bin")
    (folder / "near").symlink_to(folder.parent / "far")
    return "near/weights.bin"


def _nothing(folder: Path) -> str:
    return ""


@pytest.mark.parametrize("where", ["initializer", "constant", "body"])
@pytest.mark.parametrize("place", [_move_out, _absolute, _link, _linked_folder, _nothing], ids=lambda f: f.__name__)
def test_data_outside_the_folder_are_refused(tmp_path: Path, place, where: str) -> None:
    folder = tmp_path / "model"
    path = saved(folder)
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    location = place(folder)
    next(e for e in tensor.external_data if e.key == "location").value = location
    others = [
        t for t in onnx.load_from_string(network().SerializeToString()).graph.initializer if t.name != tensor.name
    ]
    del model.graph.initializer[:]
    model.graph.initializer.extend(others)
    if where == "initializer":
        model.graph.initializer.append(tensor)
    else:
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        if where == "constant":
            model.graph.node.insert(0, node)
        else:
            body = onnx.helper.make_graph([node], "b", [], [onnx.helper.make_empty_tensor_value_info(tensor.name)])
            model.graph.node.append(onnx.helper.make_node("If", ["c"], ["z"], then_branch=body, else_branch=body))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="names external data outside the model's folder"):
        read_model(path)


def test_data_that_are_missing_or_cut_off_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    data = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(data[:-8])
    with pytest.raises(InputError, match="cannot be read"):
        read_model(path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"cannot be read.*weights\.bin"):
        read_model(path)


def test_numbers_of_four_bits_are_read_whole(tmp_path: Path) -> None:
    tensor = onnx.helper.make_tensor("w", TensorProto.INT4, (64, 64), np.arange(4096) % 16 - 8)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, (64, 64))],
        [tensor],
    )
    model = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid("", 21)])
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    (found,) = read_model(tmp_path / "m.onnx").graph.initializer
    assert not tensors.is_outside(found)
    assert np.array_equal(numpy_helper.to_array(found), numpy_helper.to_array(tensor))


def test_weights_outside_that_are_computed_from_others(tmp_path: Path) -> None:
    """What is folded is computed apart, where the other weights have no readers."""
    g = Builder()
    x = g.Relu(g.MatMul(g.input("x", ["n", 16]), g.Transpose(g.weight(32, 16))))
    model = g.model(g.linear(g.Relu(g.linear(x, 24)), 10))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    result = prune(path, speedup=1.5, threads=1, reconstruct=False)
    assert result.report.achieved.macs >= 1.5


@pytest.mark.parametrize("linear", [True, False])
def test_sparse_weights_are_written_out_and_cut(tmp_path: Path, linear: bool) -> None:
    """An initializer and a Constant, their places counted or named; previously onnxruntime was said to refuse them."""
    model = network()
    dense = [numpy_helper.to_array(t) * (numpy_helper.to_array(t) > 0) for t in model.graph.initializer[:2]]

    def sparse(array: np.ndarray, name: str) -> onnx.SparseTensorProto:
        places = np.flatnonzero(array) if linear else np.argwhere(array)
        values = numpy_helper.from_array(array[array != 0], name)
        return helper.make_sparse_tensor(values, numpy_helper.from_array(places.astype(np.int64)), list(array.shape))

    first, second = model.graph.initializer[:2]
    model.graph.sparse_initializer.append(sparse(dense[0], first.name))
    constant = helper.make_node("Constant", [], [second.name], sparse_value=sparse(dense[1], second.name))
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    del expected.graph.sparse_initializer[:]
    for k, array in enumerate(dense):
        expected.graph.initializer[k].CopyFrom(numpy_helper.from_array(array, expected.graph.initializer[k].name))
    model.graph.node.insert(0, constant)
    del model.graph.initializer[:2]
    onnx.save(model, tmp_path / "m.onnx")
    options = {"data": X, "speedup": 2, "threads": 1, "select": "l1", "reconstruct": False}
    results = [prune(each, **options) for each in (tmp_path / "m.onnx", model, expected)]
    for result in results:
        np.testing.assert_array_equal(run(result.model, {"x": X})[0], run(results[-1].model, {"x": X})[0])
        assert {first.name, second.name} <= set(result.report.removed)


def test_a_model_in_memory_has_to_say_where_its_tensors_are(tmp_path: Path) -> None:
    apart = onnx.load(saved(tmp_path), load_external_data=False)
    with pytest.raises(InputError, match="is in another file, and nothing says in which folder; try the path"):
        prune(apart, threads=1)
    assert len(analyze(read_model(tmp_path / "m.onnx"), threads=1).analysis.groups) > 1


def test_what_stands_beside_the_new_model_is_left_alone(tmp_path: Path) -> None:
    """The file of tensors has the name that it has beside the original, but not where another model keeps its own."""
    path, out = saved(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    two, three = (prune(path, data=X, speedup=speedup, threads=1, reconstruct=False) for speedup in (2, 3))
    two.save(out / "two.onnx")
    three.save(out / "three.onnx", force=True)
    assert {p.name for p in out.iterdir()} == {"two.onnx", "weights.bin", "three.onnx", "three.onnx.data"}
    assert same(onnx.load(out / "two.onnx"), two.model) and same(onnx.load(out / "three.onnx"), three.model)
    two.save(out / "three.onnx", force=True)
    three.save(out / "two.onnx", force=True)
    assert {p.name for p in out.iterdir()} == {"two.onnx", "weights.bin", "three.onnx", "three.onnx.data"}
    assert same(onnx.load(out / "two.onnx"), three.model) and same(onnx.load(out / "three.onnx"), two.model)


def test_a_folder_of_tensors_is_made_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    onnx.save(network(), tmp_path / "in" / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = onnx.load(tmp_path / "in" / "m.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = "deep/w.bin"
    (tmp_path / "in" / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "in" / "deep").mkdir()
    (tmp_path / "in" / "w.bin").rename(tmp_path / "in" / "deep" / "w.bin")
    line = [str(tmp_path / "in" / "m.onnx"), "-o", str(tmp_path / "out" / "m.onnx"), "--threads", "1"]
    assert main([*line, "--select", "l1", "--no-reconstruct"]) == 0
    assert (tmp_path / "out" / "deep" / "w.bin").is_file()
    onnx.load(tmp_path / "out" / "m.onnx")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-o in/weights.bin --force", "output in/weights.bin is the file weights.bin of the model's tensors itself"),
        ("--report in/weights.bin --force", "report in/weights.bin is the file weights.bin of the model's tensors"),
        ("-o in/stale.onnx", "file of tensors in/stale.onnx.data exists already; try another path with -o, or --force"),
        ("-o in/new.onnx --report in/new.onnx.data", "file of tensors in/new.onnx.data is the report new.onnx.data"),
    ],
)
def test_files_of_tensors_are_looked_at_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    saved(tmp_path / "in")
    (tmp_path / "in" / "stale.onnx.data").write_bytes(b"precious")
    before = {p: p.read_bytes() for p in (tmp_path / "in").iterdir()}
    monkeypatch.chdir(tmp_path)
    assert main(["in/m.onnx", *line.split()]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1  # and no warning of random data: nothing was begun
    assert {p: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before
    assert main(["collect", "in/m.onnx", "-o", "in/weights.bin", "--force"]) == 2
    assert {p: p.read_bytes() for p in (tmp_path / "in").iterdir()} == before
