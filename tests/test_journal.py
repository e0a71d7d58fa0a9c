"""Runs that were stopped go on to the same model, to the bit; old ones do not pile up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from builder import Builder

from onnxprune import journal as module
from onnxprune.api import Result, prune_family
from onnxprune.cli import main
from onnxprune.files import cache_folder
from onnxprune.fitting import Fitting
from onnxprune.journal import Journal
from onnxprune.pipeline import Chooser

X = np.random.default_rng(0).standard_normal((60, 3, 8, 8)).astype(np.float32)
OPTIONS: dict[str, Any] = {"data": X, "threads": 1, "batch_size": 16}


def network() -> onnx.ModelProto:
    """A stem with several readers, residual blocks, and a pair of layers that is fitted together."""
    g = Builder(seed=5)
    x = g.Relu(g.conv(g.input("x", ["n", 3, 8, 8]), 12, name="stem"))
    for k in range(2):
        x = g.Relu(g.Add(x, g.conv(g.Relu(g.conv(x, 16, name=f"a{k}")), 12, name=f"b{k}")))
    x = g.Relu(g.conv(g.Relu(g.conv(x, 12, name="c")), 12, group=2, name="d"))
    return g.model(g.gemm(g.Flatten(g.GlobalAveragePool(x)), 4, name="head"))


class Stopped(BaseException):
    """As a signal would."""


class Short(Journal):
    """Is stopped right behind, or in the middle of, an entry."""

    def __init__(self, folder: Path, entries: int, resume: bool) -> None:
        super().__init__(folder, resume=resume)
        self.left = entries

    def put(self, *entry: Any) -> None:
        super().put(*entry)
        self.left -= 1
        if not self.left:
            (self.place / "next.npz.1.part").write_bytes(b"half of it")
            raise Stopped


def same(a: Sequence[Result], b: Sequence[Result]) -> bool:
    return all(
        x.model.SerializeToString() == y.model.SerializeToString()
        and x.plan == y.plan
        and x.report.groups == y.report.groups
        and x.report.hashes == y.report.hashes
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def whole() -> tuple[Result, ...]:
    return prune_family(network(), [1.5, 2.5], **OPTIONS)


def test_a_run_stopped_again_and_again_gives_the_same(whole: tuple[Result, ...], tmp_path: Path) -> None:
    stops = 0
    for entries in (1, 1, 2, 4, 3, 5, 100):  # statistics, damage, readers and blocks of both members
        run = Short(tmp_path, entries, resume=stops > 0)
        try:
            found = prune_family(network(), [1.5, 2.5], journal=run, **OPTIONS)
        except Stopped:
            stops += 1
            assert run.count
        else:
            break
    assert stops > 4
    assert same(found, whole)
    run.end()
    assert not any(tmp_path.iterdir())


def test_a_thorough_run_goes_on_between_its_two_sweeps_and_in_the_second(tmp_path: Path) -> None:
    options = {**OPTIONS, "thorough": True}
    first = Journal(tmp_path / "whole")
    whole = prune_family(network(), [2.0], journal=first, **options)
    names = sorted(path.stem for path in first.place.iterdir())
    assert sum(name.startswith("again-") for name in names) == 1
    sweeps = {name.split("-")[0] for name in names if "-reader" in name}
    assert len(sweeps) == 2
    half = sum(name.startswith(min(sweeps)) for name in names) + 2  # with statistics and damage
    for entries in (half, half + 1, half + 3, first.count - 1):
        folder = tmp_path / str(entries)
        with pytest.raises(Stopped):
            prune_family(network(), [2.0], journal=Short(folder, entries, resume=False), **options)
        again = prune_family(network(), [2.0], journal=Journal(folder, resume=True), **options)
        assert same(again, whole)


def test_what_was_finished_is_not_done_again(
    whole: tuple[Result, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Journal(tmp_path)
    prune_family(network(), [1.5, 2.5], journal=first, **OPTIONS)
    assert first.count > 10
    for name in ("collect", "measured_damage"):
        monkeypatch.delattr(Chooser, name)
    for name in ("reader", "block"):
        monkeypatch.delattr(Fitting, name)
    said: list[str] = []
    again = prune_family(network(), [1.5, 2.5], journal=Journal(tmp_path, resume=True, say=said.append), **OPTIONS)
    assert same(again, whole)
    assert said == [f"resumed: {first.count} finished steps are taken from the run that was stopped"]


def test_damaged_entries_are_made_again(whole: tuple[Result, ...], tmp_path: Path) -> None:
    first = Journal(tmp_path)
    prune_family(network(), [1.5, 2.5], journal=first, **OPTIONS)
    for k, path in enumerate(sorted(first.place.iterdir())):
        content = path.read_bytes()
        path.write_bytes((content, b"", content[: len(content) // 2], content[:-9])[k % 4])
    again = prune_family(network(), [1.5, 2.5], journal=Journal(tmp_path, resume=True), **OPTIONS)
    assert same(again, whole)


@pytest.mark.parametrize("change", [{"seed": 1}, {"samples": 30}, {"data": X + 1}, {"select": "l1"}, {"batch_size": 8}])
def test_another_run_is_not_gone_on_from(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(Stopped):
        prune_family(network(), [2.0], journal=Short(tmp_path, 1, resume=False), **OPTIONS)
    said: list[str] = []
    run = Journal(tmp_path, resume=True, say=said.append)
    prune_family(network(), [2.0], journal=run, **{**OPTIONS, "reconstruct": False, **change})
    assert said == ["there is nothing to resume for this model, these data and options: begun from the start"]


def test_a_run_that_is_not_to_go_on_begins_from_the_start(tmp_path: Path) -> None:
    run = Journal(tmp_path)
    run.begin("key")
    run.put("step", {"a": [1]}, [("x/y", np.arange(3))])
    assert run.get("step") is None
    again = Journal(tmp_path, resume=True)
    again.begin("key")
    about, arrays = again.get("step")
    assert about == {"a": [1]}
    assert arrays.keys() == {"x/y"}
    Journal(tmp_path).begin("key")
    assert again.count == 0
    assert again.get("step") is None


def test_old_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(key: str, size: int = 10, age: float = 0.0) -> Journal:
        run = Journal(tmp_path)
        run.begin(key)
        run.put("step", {}, [("x", np.zeros(size, np.uint8))])
        stamp = time.time() - age
        os.utime(run.place, (stamp, stamp))
        return run

    runs = [begin(str(k), age=100 - k) for k in range(8)]
    assert [run.count for run in runs] == [0] * 3 + [1] * 5
    begin("old", age=31 * 86400)
    begin("new")
    assert len(list(tmp_path.iterdir())) == module.MOST_RUNS
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)
    begin("large", size=100_000)
    begin("last")
    assert [run.count for run in runs] == [0] * 8
    assert len(list(tmp_path.iterdir())) < 3


def test_a_place_that_cannot_be_written_costs_nothing_but_the_way_back(
    whole: tuple[Result, ...], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    said: list[str] = []
    found = prune_family(network(), [1.5, 2.5], journal=Journal(tmp_path / "file", say=said.append), **OPTIONS)
    assert same(found, whole)
    assert len(said) == 1 and "cannot be written" in said[0]


def test_the_command_goes_on_after_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path / "cache"))
    onnx.save(network(), "m.onnx")
    np.savez("data.npz", x=X)
    line = "m.onnx --data data.npz --threads 1 --batch-size 4 --speedup 2"
    assert main([*line.split(), "-o", "whole.onnx"]) == 0
    assert not any((cache_folder() / "runs").iterdir())
    running = subprocess.Popen([sys.executable, "-m", "onnxprune", *line.split()], stderr=subprocess.PIPE)
    try:
        while running.poll() is None and len(list(cache_folder().glob("runs/*/*.npz"))) < 4:
            time.sleep(0.001)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
        running.stderr.close()
    assert list(cache_folder().glob("runs/*/*.npz"))
    assert not Path("m.pruned.onnx").exists()
    capsys.readouterr()
    assert main([*line.split(), "--resume"]) == 0
    assert "finished steps are taken from the run that was stopped" in capsys.readouterr().err
    assert Path("m.pruned.onnx").read_bytes() == Path("whole.onnx").read_bytes()
    assert not any((cache_folder() / "runs").iterdir())
    assert main([*line.split(), "--resume", "--force"]) == 0
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
def test_the_command_leaves_no_scratch_files_when_told_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    onnx.save(network(), "m.onnx")
    np.savez("data.npz", x=X)
    line = "m.onnx --data data.npz --threads 1 --batch-size 4 --speedup 2"
    running = subprocess.Popen([sys.executable, "-m", "onnxprune", *line.split()], stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not list(scratch.glob("onnxprune-*")):
        time.sleep(0.001)
    time.sleep(0.02)  # tempfile makes a folder first and sees to its removal next: between the two nobody would
    running.terminate()
    said = running.communicate()[1]
    assert (running.returncode, list(scratch.glob("onnxprune-*"))) == (130, [])
    assert "interrupted" in said and not Path("m.pruned.onnx").exists()


def test_the_command_says_that_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    onnx.save(network(), "m.onnx")
    np.savez("data.npz", x=X)
    monkeypatch.setattr(Chooser, "rank", stop)
    assert main(["m.onnx", "--data", "data.npz", "--threads", "1"]) == 130
    err = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "1 finished steps are kept: the same command with --resume goes on from there" in err[0]
    assert "interrupted" in err[1]
