"""Statistics that are kept: pruning without the data, and files that are none of this model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import Builder, run

from onnxprune import archive
from onnxprune.api import collect, prune, prune_family
from onnxprune.cli import main
from onnxprune.data import Preprocessing
from onnxprune.errors import InputError
from onnxprune.gathered import Gathered
from onnxprune.pipeline import Chooser

X = np.random.default_rng(0).standard_normal((60, 3, 8, 8)).astype(np.float32)


def network(seed: int = 5) -> onnx.ModelProto:
    """A residual block, a grouped convolution, a dynamic size."""
    g = Builder(seed=seed)
    x = g.Relu(g.conv(g.input("x", ["n", 3, "h", "w"]), 12, name="stem"))
    x = g.Relu(g.Add(x, g.conv(g.Relu(g.conv(x, 16, name="a")), 12, name="b")))
    x = g.Relu(g.conv(g.Relu(g.conv(x, 12, name="c")), 12, group=2, name="d"))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kept") / "net.stats.npz"
    collect(network(), data=X, threads=1).save(path)
    return path


def error(model: onnx.ModelProto) -> float:
    expected = run(network(), {"x": X})[0]
    return float(np.linalg.norm(run(model, {"x": X})[0] - expected) / np.linalg.norm(expected))


def test_what_is_written_comes_back(kept: Path, tmp_path: Path) -> None:
    one = collect(network(), data=X, threads=1)
    with (tmp_path / "exact.npz").open("wb") as file:
        archive.write(file, *one.pack(exact=True))
    for path, tolerance in ((kept, 1e-6), (tmp_path / "exact.npz", 0.0)):
        two = Gathered.read(path)
        assert two.grams.keys() == one.grams.keys()
        assert (two.model, two.select, two.damage) == (one.model, one.select, one.damage)
        assert two.about == json.loads(json.dumps(one.about))
        for name, gram in one.grams.items():
            assert gram.rows == two.grams[name].rows > 0
            scale = np.abs(gram.values[0]).max()
            np.testing.assert_allclose(two.grams[name].values, gram.values, rtol=0, atol=tolerance * scale)
    with np.load(kept) as file:
        assert {a.dtype for name, a in file.items() if name != "about"} == {np.dtype(np.float32)}


def test_a_family_without_the_data(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sliced = prune(network(), data=X, threads=1, speedup=2.0, reconstruct=False)
    monkeypatch.delattr(Chooser, "collect")
    monkeypatch.delattr(Chooser, "sweep")
    members = prune_family(network(), [1.5, 2.0, 3.0], stats=kept, threads=1)
    for speedup, member in zip((1.5, 2.0, 3.0), members, strict=True):
        report = member.report
        assert speedup <= report.achieved.macs < 1.1 * speedup
        assert report.fidelity is None
        assert (report.data.samples, report.data.is_random) == (60, False)
        assert report.options["stats"] == str(kept)
        for words in ("fitted once", "fidelity was not measured"):
            assert sum(words in warning for warning in report.warnings) == 1
        assert not any("random" in warning for warning in report.warnings)
        assert report.proof.max_relative_difference < 1e-4
    assert error(members[0].model) < error(members[1].model) < error(members[2].model)
    assert error(members[1].model) < 0.7 * error(sliced.model)


def test_widths_and_units_are_those_of_a_run_with_the_data(kept: Path) -> None:
    """Which units go is seen from the original here, and on the way there; without a fit the two are one."""
    options: dict[str, Any] = {"threads": 1, "reconstruct": False, "speedup": 2.0}
    with_data, without = prune(network(), data=X, **options), prune(network(), stats=kept, **options)
    assert without.plan == with_data.plan
    assert without.model == with_data.model
    assert without.report.before.macs == with_data.report.before.macs


def test_data_beside_statistics_measure_fidelity(kept: Path) -> None:
    same = prune(network(), stats=kept, data=X, threads=1).report.fidelity
    assert same.samples == 6  # those that no sum has seen
    other = prune(network(), stats=kept, data=X[:20] + 1, threads=1).report.fidelity
    assert other.samples == 20
    assert not other.is_random


def test_options_that_the_statistics_do_not_have_are_named(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
    path, options = tmp_path / "stats.npz", Preprocessing(mean=0.5, std=(0.2, 0.2, 0.3))
    collect(network(), data=images, preprocessing=options, threads=1).save(path)

    def said(**given: Any) -> list[str]:
        report = prune(network(), stats=path, threads=1, **given).report
        return [warning for warning in report.warnings if "preprocessing" in warning]

    assert not said() and not said(data=images, preprocessing=options)
    assert "are others than those that the statistics were collected with" in said(data=images)[0]
    assert "not applied: there were no data" in said(preprocessing=options)[0]


def spoil(path: Path, target: Path, **changes: Any) -> Path:
    about, arrays = archive.read(path)
    with target.open("wb") as file:
        archive.write(file, about | changes, arrays.items())
    return target


def test_files_that_are_not_this_models(kept: Path, tmp_path: Path) -> None:
    whole = kept.read_bytes()
    files: dict[str, bytes] = {
        "empty": b"",
        "text": b"statistics",
        "short": whole[: len(whole) // 2],
        "shorter": whole[:-30],
        "flipped": whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :],
        "gap": whole[: len(whole) // 3] + whole[len(whole) // 3 + 40 :],
        "header": whole.replace(b"), }", b"(, }", 1),
        "packed": whole[: whole.index(b"PK\x01\x02") + 10] + b"\x63" + whole[whole.index(b"PK\x01\x02") + 11 :],
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "data.npz", images=X)
    np.save(tmp_path / "array.npy", X)
    np.savez(tmp_path / "pickle.npz", about=np.array({"format": "onnxprune statistics"}, dtype=object))
    np.savez(tmp_path / "list.npz", about=np.array("[1]"))
    spoil(kept, tmp_path / "format.npz", format="something else")
    spoil(kept, tmp_path / "bare.npz", about={})
    spoil(kept, tmp_path / "rows.npz", readers={"w": {"rows": 1, "shape": [1, 2, 2]}})
    for path in tmp_path.iterdir():
        with pytest.raises(InputError, match=r"statistics .*expected a whole file that onnxprune collect wrote"):
            prune(network(), stats=path, threads=1)
    version = spoil(kept, tmp_path / "version.npz", version=2)
    with pytest.raises(InputError, match="expected version 1, found 2"):
        prune(network(), stats=version, threads=1)
    with pytest.raises(InputError, match="no such file"):
        prune(network(), stats=tmp_path / "nowhere.npz", threads=1)
    with pytest.raises(InputError, match="a folder"):
        prune(network(), stats=tmp_path, threads=1)
    with pytest.raises(InputError, match="collected from another model"):
        prune(network(seed=6), stats=kept, threads=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": "lasso"}, "the damage that --select greedy does, found --select lasso"),
        ({"samplers": False}, "holds nothing for the channels of"),
        ({"only": "^d$"}, "holds nothing for layer 'a'"),
    ],
)
def test_what_a_file_does_not_hold(kept: Path, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    if "only" in options:
        collect(network(), data=X, threads=1, **options).save(tmp_path / "other.npz")
        kept, options = tmp_path / "other.npz", {}
    with pytest.raises(InputError, match=message):
        prune(network(), stats=kept, threads=1, **options)


@pytest.mark.parametrize("options", [{"budget": "uniform", "select": "lasso"}, {"select": "l1", "reconstruct": False}])
def test_ways_that_ask_for_no_damage_take_any_file(kept: Path, options: dict[str, Any]) -> None:
    result = prune(network(), stats=kept, threads=1, **options)
    assert result.report.achieved.macs >= 2.0


def test_weights_may_stay_as_they_are(tmp_path: Path) -> None:
    """Of layers without a bias, as of others: for a fit they are given one."""
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, bias=False)), 12, bias=False))
    model = g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4))
    collect(model, data=X, threads=1).save(tmp_path / "s.npz")
    report = prune(model, stats=tmp_path / "s.npz", threads=1, reconstruct=False).report
    assert report.achieved.macs >= 2.0


def test_fewer_layers_than_were_collected_are_enough(kept: Path) -> None:
    report = prune(network(), stats=kept, threads=1, speedup=1.05, only="^d$", best_effort=True).report
    assert {g.name for g in report.groups if g.kept < g.units} == {"d"}


def test_the_command_collects_and_prunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "m.onnx")
    np.savez("data.npz", x=X)
    assert main(["collect", "m.onnx", "--data", "data.npz", "--threads", "1", "-o", "s.npz"]) == 0
    assert "written: s.npz" in capsys.readouterr().out
    assert main(["collect", "m.onnx", "--data", "data.npz", "-o", "s.npz"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["m.onnx", "--stats", "s.npz", "--speedup", "2", "--threads", "1", "--report", "r.json"]) == 0
    out, err = capsys.readouterr()
    assert "fidelity was not measured" in err
    assert "same top-1" not in out
    assert json.loads(Path("r.json").read_text())["fidelity"] is None
    before = sorted(tmp_path.iterdir())
    Path("s.npz").write_bytes(b"")
    for line in ("m.onnx --stats s.npz -o n.onnx", "m.onnx --stats s.npz -o s.npz --force"):
        assert main(line.split()) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and "statistics" in err
    assert sorted(tmp_path.iterdir()) == before
