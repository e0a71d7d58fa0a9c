"""The command line: one clear sentence, the right exit status, and nothing written where something is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from onnxprune import api, exits, files, runtime
from onnxprune.cli import main
from onnxprune.errors import InternalError
from onnxprune.options import PROVIDERS
from onnxprune.report import Report

WIDTH = 16
ROOT = Path(__file__).parent.parent


def build(*, groups=True, classes=4, seed=0, name="tiny") -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, average, Gemm; without groups only one Conv from input to output."""
    rng = np.random.default_rng(seed)

    def weight(label, *shape):
        return numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4"), label)

    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    if groups:
        weights = [
            weight("w1", WIDTH, 3, 3, 3),
            weight("w2", WIDTH, WIDTH, 3, 3),
            weight("w3", classes, WIDTH),
            weight("b3", classes),
        ]
        nodes = [
            helper.make_node("Conv", ["x", "w1"], ["c1"], "first", pads=[1] * 4),
            helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
            helper.make_node("Conv", ["r1", "w2"], ["c2"], "second", pads=[1] * 4),
            helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
            helper.make_node("GlobalAveragePool", ["r2"], ["g"], "pool"),
            helper.make_node("Flatten", ["g"], ["f"], "flatten"),
            helper.make_node("Gemm", ["f", "w3", "b3"], ["y"], "classifier", transB=1),
        ]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes])
    else:
        weights = [weight("w1", classes, 3, 3, 3)]
        nodes = [helper.make_node("Conv", ["x", "w1"], ["y"], "only", pads=[1] * 4)]
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", classes, 8, 8])
    graph = helper.make_graph(nodes, name, [image], [output], weights)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def refused_by_onnxruntime() -> bytes:
    model = build()
    model.graph.node[2].op_type = "NoSuchOperator"
    return model.SerializeToString()


def images(shape=(24, 8, 8, 3), dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def spoiled(value):
    floats = images((24, 3, 8, 8), np.float32) / 255
    floats[5, 0, 3, 3] = value
    return floats


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a good model, good data, and one of everything that is wrong; it is the working directory."""
    good = build().SerializeToString()
    files = {
        "model.onnx": good,
        "empty.onnx": b"",
        "random.onnx": np.random.default_rng(1).bytes(4096),
        "text.onnx": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n",
        "truncated.onnx": good[: len(good) // 2],
        "short.onnx": good[:-7],
        "refused.onnx": refused_by_onnxruntime(),
        "fixed.onnx": build(groups=False).SerializeToString(),
        "existing.onnx": b"precious",
        "existing.json": b"precious",
        "other.bin": b"not data",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "data.npz", images=images())
    np.save(tmp_path / "shape.npy", images((24, 3, 9, 9), np.float32))
    np.save(tmp_path / "pixels.npy", images((24, 9, 9, 3)))
    np.save(tmp_path / "channels.npy", images((24, 8, 8, 5)))
    np.save(tmp_path / "dtype.npy", images((24, 3, 8, 8), np.int64))
    np.save(tmp_path / "layout.npy", images((24, 8, 8, 3), np.float32) / 255)
    np.savez(tmp_path / "names.npz", left=images(), right=images())
    np.save(tmp_path / "nan.npy", spoiled(np.nan))
    np.save(tmp_path / "inf.npy", spoiled(np.inf))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "a_folder.onnx").mkdir()
    (tmp_path / "a_folder.onnx" / "inside").write_bytes(b"x")
    (tmp_path / "linked.onnx").symlink_to("model.onnx")
    os.link(tmp_path / "model.onnx", tmp_path / "hard.onnx")
    (tmp_path / "dangling.onnx").symlink_to("nowhere.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content's digest, every link with its target."""
    return {
        str(path.relative_to(folder)): os.readlink(path)  # noqa: PTH115 (as it stands, not resolved)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


GOOD = "model.onnx --data data.npz"

REFUSED = [
    # the model
    ("nowhere.onnx", 2, "no such file"),
    ("nowhere/model.onnx", 2, "no such file"),
    ("a_folder.onnx", 2, "is a folder"),
    ("empty.onnx", 2, "is empty"),
    ("random.onnx", 2, "not a readable ONNX model"),
    ("text.onnx", 2, "not a readable ONNX model"),
    ("truncated.onnx", 2, "not a readable ONNX model"),
    ("short.onnx", 2, "not a readable ONNX model"),
    ("refused.onnx", 2, "onnxruntime refuses the model"),
    ("inspect nowhere.onnx", 2, "no such file"),
    ("inspect random.onnx", 2, "not a readable ONNX model"),
    ("inspect refused.onnx", 2, "onnxruntime refuses the model"),
    ("compare model.onnx nowhere.onnx", 2, "no such file"),
    ("compare model.onnx empty.onnx", 2, "is empty"),
    ("compare model.onnx refused.onnx", 2, "onnxruntime refuses the model"),
    ("compare model.onnx fixed.onnx --data nan.npy", 2, "NaN"),
    # the data
    ("model.onnx --data nowhere.npz", 2, "no such file or folder"),
    ("model.onnx --data other.bin", 2, "other content"),
    ("model.onnx --data shape.npy", 2, "expected shape [N, 3, 8, 8]"),
    ("model.onnx --data pixels.npy", 2, "expected images of 8x8 pixels"),
    ("model.onnx --data channels.npy", 2, "expected uint8 images"),
    ("model.onnx --data dtype.npy", 2, "expected float32"),
    ("model.onnx --data layout.npy", 2, "the data are NHWC"),
    ("model.onnx --data names.npz", 2, "expected arrays named 'x'"),
    ("model.onnx --data nothing", 2, "an empty folder"),
    ("model.onnx --data=", 2, "found an empty path"),
    ("model.onnx --data nan.npy", 2, "NaN or infinity"),
    ("model.onnx --data inf.npy", 2, "NaN or infinity"),
    ("model.onnx --data nomodule:function", 2, "expected a function that can be imported"),
    ("inspect model.onnx --data shape.npy", 2, "expected shape [N, 3, 8, 8]"),
    ("compare model.onnx model.onnx --data shape.npy", 2, "expected shape [N, 3, 8, 8]"),
    # the options
    (f"{GOOD} --speedup 1", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup 0.5", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup -2", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup nan", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup inf", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup two", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup 2,", 2, "expected a finite number above 1"),
    (f"{GOOD} --speedup 1.5,x", 2, "found 'x'"),
    (f"{GOOD} --speedup 2,1.5,2.0", 2, "every speed-up once, found 2 again"),
    (f"{GOOD} --only (", 2, "not a regular expression"),
    (f"{GOOD} --exclude [", 2, "not a regular expression"),
    (f"{GOOD} --only nolayer", 2, "matches no layer"),
    (f"{GOOD} --exclude nolayer", 2, "matches no layer"),
    ("inspect model.onnx --only (", 2, "not a regular expression"),
    (f"{GOOD} --samples 0", 2, "--samples"),
    (f"{GOOD} --batch-size 0", 2, "--batch-size"),
    (f"{GOOD} --seed -1", 2, "--seed"),
    (f"{GOOD} --threads -1", 2, "--threads"),
    (f"{GOOD} --provider abacus", 2, "'abacus' is not one of"),
    (f"{GOOD} --select best", 2, "'best' is not one of"),
    (f"{GOOD} --scale nan", 2, "expected a number such as 1/255"),
    (f"{GOOD} --scale 0", 2, "scale"),
    (f"{GOOD} --mean a,b", 2, "expected numbers such as"),
    (f"{GOOD} --mean 0.5,0.5", 2, "expected 1 or 3 numbers as mean"),
    (f"{GOOD} --std 0", 2, "above 0 as std"),
    (f"{GOOD} --quiet --verbose", 2, "exclude each other"),
    (f"{GOOD} --nonsense", 2, "No such option"),
    (f"{GOOD} another.onnx", 2, "unexpected extra argument"),
    ("prune", 2, "Missing argument"),
    # the output
    (f"{GOOD} -o model.onnx", 2, "is the model itself"),
    (f"{GOOD} -o model.onnx --force", 2, "is the model itself"),
    (f"{GOOD} -o ./model.onnx --force", 2, "is the model itself"),
    (f"{GOOD} -o linked.onnx --force", 2, "is the model itself"),
    (f"{GOOD} -o hard.onnx --force", 2, "is the model itself"),
    ("linked.onnx -o model.onnx --force", 2, "is the model itself"),
    (f"{GOOD} -o data.npz --force", 2, "is the calibration data itself"),
    (f"{GOOD} -o existing.onnx", 2, "exists already"),
    (f"{GOOD} -o dangling.onnx", 2, "exists already"),
    (f"{GOOD} -o nothing", 2, "is a folder"),
    (f"{GOOD} -o nowhere/out.onnx", 2, "there is no folder nowhere"),
    (f"{GOOD} -o other.bin/out.onnx", 2, "there is no folder other.bin"),
    (f"{GOOD} -o {'n' * 250}.onnx", 2, "cannot be written"),
    (f"{GOOD} -o /dev/null --force", 2, "not a regular file"),
    (f"{GOOD} --report existing.json", 2, "exists already"),
    (f"{GOOD} --report nowhere/report.json", 2, "there is no folder nowhere"),
    (f"{GOOD} --report model.onnx --force", 2, "is the model itself"),
    (f"{GOOD} -o out.onnx --report out.onnx", 2, "is the output itself"),
    (f"{GOOD} --speedup 1.5,2 -o out.onnx", 2, "one file for 2 speed-ups; try out-{speedup}x.onnx"),
    (f"{GOOD} --speedup 1.5,2 --report out.json", 2, "one file for 2 speed-ups; try out-{speedup}x.json"),
    (f"{GOOD} --speedup 1.5,2 -o out{{speedup}} --report out{{speedup}}", 2, "is the output itself"),
    # the target
    (f"{GOOD} --speedup 2,100000", 3, "a speed-up of 100000 cannot be reached"),
    (f"{GOOD} --speedup 100000", 3, "reach"),
    ("fixed.onnx --speedup 1.5", 3, "reach"),
]


@pytest.mark.parametrize(("line", "status", "fragment"), REFUSED, ids=[line[:60] for line, _, _ in REFUSED])
def test_refusal_is_one_sentence_and_writes_nothing(folder, capsys, line, status, fragment):
    before = listing(folder)
    assert main(line.split()) == status
    out, err = capsys.readouterr()
    assert fragment in err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    assert out == ""
    assert listing(folder) == before


@pytest.mark.parametrize("option", ["-o", "--report"])
def test_folder_without_the_right_to_write(folder, capsys, monkeypatch, option):
    def deny(*_, **__):  # root may write everywhere
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", deny)
    assert main([*GOOD.split(), option, "nothing/file"]) == 2
    assert "cannot be written (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("speedup", ["2", "1.5,2,3"])
def test_output_that_fails_at_the_end_leaves_nothing(folder, capsys, monkeypatch, speedup):
    def full(model, path, **_):
        if "2" in path.name:  # members before it are written by then
            raise OSError(28, "No space left on device")
        real(model, path, **_)

    real = files.write_model
    monkeypatch.setattr(files, "write_model", full)
    before = listing(folder)
    places = ["-o", "out{speedup}.onnx", "--report", "out{speedup}.json"]
    assert main([*GOOD.split(), *places, "--select", "l1", "--no-reconstruct", "--speedup", speedup]) == 2
    assert "out2.onnx cannot be written (No space left on device); nothing was written" in capsys.readouterr().err
    assert listing(folder) == before


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_files_that_appear_together_come_all_or_none(tmp_path, monkeypatch, failing):
    places = [tmp_path / name for name in ("old", "new", "older")]
    for place in (places[0], places[2]):
        place.write_text("precious")
    real, before = Path.replace, listing(tmp_path)

    def refuse(self, target):
        if Path(target) == places[failing] and not self.name.endswith(".before"):
            raise OSError(1, "no")
        return real(self, target)

    def write():
        with files.Together() as together:
            for place in places:
                with together.open(place) as file:
                    file.write(b"new")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write()
    assert listing(tmp_path) == before
    monkeypatch.undo()
    write()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(("old", "new", "older"), "new")


FAMILY = f"{GOOD} --select l1 --no-reconstruct --speedup 1.5,2,3"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ("", "model.pruned-{}x.onnx"),
        ("-o nothing", "nothing/model.pruned-{}x.onnx"),
        ("-o nothing/a{speedup}.onnx", "nothing/a{}.onnx"),
        ("-o existing{speedup}.onnx --report r{speedup}.json", "existing{}.onnx r{}.json"),
        ("--report nothing", "model.pruned-{}x.onnx nothing/model.pruned-{}x.json"),
    ],
)
def test_names_of_a_family(folder, capsys, options, names):
    before = set(listing(folder))
    assert main(f"{FAMILY} {options}".split()) == 0
    expected = {name.format(x) for name in names.split() for x in ("1.5", "2", "3")}
    assert set(listing(folder)) - before == expected
    macs = [api.count_model_macs(onnx.load(name)) for name in sorted(expected) if name.endswith("onnx")]
    whole = api.count_model_macs(build())
    assert all(x <= whole / m <= 1.1 * x for x, m in zip((1.5, 2, 3), macs, strict=True))
    out, err = capsys.readouterr()
    assert all("no widths were found that come closer" in line for line in err.splitlines())
    for word in ("asked", "1.5x", "2x", "3x", "original", "MACs", "parameters", "latency", "alike"):
        assert word in out
    assert out.count("written: ") == 3


def test_a_family_as_json(folder, capsys):
    assert main(f"{FAMILY} --json".split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [member["target"]["speedup"] for member in found["members"]] == [1.5, 2, 3]
    assert [member["output"] for member in found["members"]] == [f"model.pruned-{x}x.onnx" for x in ("1.5", "2", "3")]
    reports = [Report.from_json(json.dumps(member)) for member in found["members"]]
    assert all(report.proof.max_relative_difference < 1e-4 for report in reports)
    assert all("no widths were found that come closer" in line for line in err.splitlines())


def test_default_output_stands_beside_the_model(folder, capsys):
    before = listing(folder)
    assert main(f"{GOOD} --speedup 2 --report report.json".split()) == 0
    out, err = capsys.readouterr()
    after = listing(folder)
    assert set(after) - set(before) == {"model.pruned.onnx", "report.json"}
    assert {name: after[name] for name in before} == before
    assert all("no widths were found that come closer" in line for line in err.splitlines())  # of so few channels
    for word in ("group", "kept/total", "error", "MACs", "parameters", "file size", "latency", "top-1"):
        assert word in out
    onnx.checker.check_model(onnx.load("model.pruned.onnx"))
    report = Report.from_json(Path("report.json").read_text())
    assert report.achieved.macs >= 2
    assert main(f"{GOOD} --speedup 2".split()) == 2  # the output is there now
    assert "exists already" in capsys.readouterr().err
    assert main(f"{GOOD} --speedup 2 --force".split()) == 0
    assert listing(folder)["model.pruned.onnx"] == after["model.pruned.onnx"]


@pytest.mark.parametrize(
    ("line", "output"),
    [
        (f"prune {GOOD}", "model.pruned.onnx"),
        ("--data data.npz --speedup 1.5 model.onnx", "model.pruned.onnx"),
        (f"{GOOD} --select l1 --no-reconstruct -o nothing/a", "nothing/a"),
        (f"{GOOD} -o existing.onnx --force", "existing.onnx"),
        (f"{GOOD} --speedup 100000 --best-effort", "model.pruned.onnx"),
        (f"{GOOD} --only first --speedup 1.2", "model.pruned.onnx"),
        (f"{GOOD} --mean 0.5,0.4,0.3 --std 1/4 --bgr --scale 1/255 --batch-size 5 --samples 12", "model.pruned.onnx"),
    ],
)
def test_forms_that_write(folder, capsys, line, output):
    before = listing(folder)
    assert main(line.split()) == 0
    capsys.readouterr()
    after = listing(folder)
    assert {name for name in after if after[name] != before.get(name)} == {output}
    onnx.checker.check_model(onnx.load(output))


def test_json_is_the_only_thing_on_stdout(folder, capsys):
    assert main(f"{GOOD} --json".split()) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["output"] == "model.pruned.onnx"
    assert found["schema_version"] == "1"
    assert all("no widths were found that come closer" in line for line in err.splitlines())


def test_what_the_source_of_the_data_prints_is_no_result(folder, capsys):
    (folder / "calib_prints.py").write_text(
        "import numpy as np\nprint('imported')\n"
        "def f():\n    print('called')\n    yield np.ones((1, 3, 8, 8), np.float32)\n"
    )
    assert main(["model.onnx", "--data", "calib_prints:f", "--select", "l1", "--no-reconstruct", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["data"]["samples"] == 1
    assert "imported" in err and "called" in err


def test_quiet_says_nothing(folder, capsys):
    assert main(["model.onnx", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_random_data_are_warned_of(folder, capsys):
    assert main(["model.onnx"]) == 0
    out, err = capsys.readouterr()
    assert "no calibration data" in err
    assert "random inputs say nothing" in out


def test_one_unreadable_image_is_named_and_the_rest_used(folder, capsys):
    for k, pixels in enumerate(images((12, 8, 8, 3))):
        Image.fromarray(pixels).save(folder / "nothing" / f"{k}.png")
    (folder / "nothing" / "7.png").write_bytes(b"no image")
    assert main(["model.onnx", "--data", "nothing"]) == 0
    err = capsys.readouterr().err
    assert "7.png" in err and err.count("unreadable image") == 1


def test_inspect_shows_groups_and_what_is_frozen(folder, capsys):
    assert main(["inspect", "model.onnx"]) == 0
    out = capsys.readouterr().out
    for word in ("first", "second", "16", "an output of the graph", "axis 1 of y", "largest reachable speed-up"):
        assert word in out
    assert main(["inspect", "model.onnx", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [group["units"] for group in found["groups"]] == [WIDTH, WIDTH]
    assert found["reachable"] > 2 and {entry["channels"] for entry in found["frozen"]} == {3, 4}
    assert all(entry["node"] and entry["remedy"] for entry in found["frozen"])
    assert main(["inspect", "model.onnx", "--markdown"]) == 0
    assert "Largest reachable speed-up" in capsys.readouterr().out
    assert main(["inspect", "model.onnx", "--markdown", "--json"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["inspect", "fixed.onnx"]) == 0
    assert "nothing to prune" in capsys.readouterr().out


def test_compare_puts_two_models_side_by_side(folder, capsys):
    assert main(f"{GOOD} -o out.onnx".split()) == 0
    capsys.readouterr()
    assert main(["compare", "model.onnx", "out.onnx", "--data", "data.npz"]) == 0
    out, err = capsys.readouterr()
    for word in ("model.onnx", "out.onnx", "MACs", "latency", "top-1", "24 samples"):
        assert word in out
    assert err == ""


@pytest.mark.parametrize(
    ("error", "status", "fragment"),
    [
        (InternalError("the proof failed: 'y' differs"), 1, "please report"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero; this is a fault of onnxprune"),
        (ValueError("two\nlines"), 1, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "scratch"), 2, "scratch cannot be used: No space left on device"),
        (MemoryError("Unable to allocate 30 GiB"), 2, "not enough memory (Unable to allocate 30 GiB); try --memory"),
        (MemoryError(), 2, "there is not enough memory; try --memory, or fewer --samples"),
    ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_faults_of_our_own(folder, capsys, monkeypatch, error, status, fragment, verbose):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(api, "prune_family", fail)
    before = listing(folder)
    assert main([*GOOD.split(), *(["--verbose"] if verbose else [])]) == status
    out, err = capsys.readouterr()
    assert fragment in err.splitlines()[-1]
    assert ("Traceback" in err) == (verbose and status != 130)
    assert out == ""
    assert listing(folder) == before


def test_control_characters_do_not_reach_the_terminal(folder, capsys):
    model = build()
    model.graph.node[0].name = "\x1b[31mfirst"
    onnx.save(model, "coloured.onnx")
    assert main(["inspect", "coloured.onnx"]) == 0
    assert main(["inspect", "coloured.onnx", "--only", "nolayer"]) == 2
    assert "\x1b" not in "".join(capsys.readouterr())


def test_providers_are_those_of_the_runtime():
    assert tuple(runtime.PROVIDERS) == PROVIDERS


@pytest.mark.parametrize(
    "arguments", [["--help"], ["prune", "--help"], ["inspect", "-h"], ["compare", "-h"], ["collect", "-h"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom onnxprune.cli import main\n"
        f"status = main({arguments!r})\n"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'scipy', 'sklearn', 'rich', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: onnxprune" in done.stdout


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("prune", ["default 1750, with --quick 1000, with --thorough 5000", "MODEL.calib.npz or test_data_set_*"]),
        ("collect", ["(default 1750)", "MODEL.calib.npz or test_data_set_*"]),
        ("compare", ["(default all)", "A.calib.npz or test_data_set_*"]),
        ("inspect", ["Default: none"]),
    ],
)
def test_help_says_the_defaults_of_each_command(capsys, command, expected):
    assert main([command, "-h"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in expected:
        assert text in said


def test_a_closed_stderr_is_no_fault(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main([*GOOD.split(), "--select", "l1", "--no-reconstruct"]) == 0
    assert (folder / "model.pruned.onnx").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("option", [[], ["--json"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stdout_that_takes_no_more_is_no_fault(folder, option, unbuffered):
    line = [sys.executable, "-m", "onnxprune", "inspect", str(folder / "model.onnx"), *option]
    own = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT, env=own)
    assert done.returncode == 2
    assert done.stderr == "onnxprune: stdout cannot be used: No space left on device\n"


def test_a_full_disk_is_no_fault_where_stdout_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert exits.status_of(OSError(errno.ENOSPC, "No space left on device", "model.onnx"), verbose=False) == 2


@pytest.mark.parametrize("module", ["onnxprune", "onnxprune.cli"])
def test_a_process_ends_with_the_status(tmp_path, module):
    done = subprocess.run(
        [sys.executable, "-m", module, str(tmp_path / "nowhere.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such file" in done.stderr


def test_no_arguments_show_the_help(capsys):
    assert main([]) == 2
    assert "Usage: onnxprune" in capsys.readouterr().err


def test_a_report_that_stood_there_comes_back_when_the_model_cannot_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "old.json").write_text("precious")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "model.pruned.onnx")

    monkeypatch.setattr(files, "write_model", fail)
    assert main(["model.onnx", "--report", "old.json", "--force"]) == 2
    assert (folder / "old.json").read_text() == "precious"
