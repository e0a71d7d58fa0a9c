"""Times of many small models: interleaved, warmed up, robust, stopped when tight enough, and kept on disk."""

from __future__ import annotations

import json
import platform
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import numpy_helper

from onnxprune.files import cache_folder
from onnxprune.runtime import Runtime

Array = npt.NDArray[Any]

_TOGETHER = 48  # sessions held at once
_LOOKED_AT = (3, 5, 8, 12)  # after these rounds it is seen which models are done; there are no more
_FEWEST_SLOW, _LONGEST = 3, 0.4  # rounds that a model gets that takes longer than so many seconds in all
_STRETCH = 1e-3  # seconds of runs of one model per round
_MOST_RUNS = 24  # per round
_WARM = 5e-3  # seconds: what takes longer is warm after two runs, else after three
_BESIDE = 3  # times before and after one that tell the machine's pace
_TIGHT = 0.01  # relative standard error at which a model is done
_STAYS = 0.01  # relative error that no further round of the same session takes away: where its memory came to lie
_ALIKE = 1.5  # how much less exactly than asked for a time may have been measured earlier
_SCHEMA = """create table if not exists readings (
    machine text, model text, seconds real, error real, asked real, primary key (machine, model))"""


@dataclass(frozen=True)
class Reading:
    """Seconds of one run, and their standard error."""

    seconds: float
    error: float = 0.0


def at_even_pace(times: Array, which: Array, count: int) -> Array:
    """Logarithms of times as if the machine had run at the same pace throughout, (rounds, models); NaN was not timed.

    A processor's pace drifts within milliseconds and stays different for tenths of a second. So what a time differs
    from the others of its model is set against what those of other models, just before and after it, differ from
    theirs.

    Args:
        times: (n,) seconds, in the order in which they were taken.
        which: (n,) of which model each is.
        count: of the models.
    """
    logs, rounds = np.log(times), _rounds(which, count)
    beside = np.arange(len(logs))[:, None] + np.array([k for k in range(-_BESIDE, _BESIDE + 1) if k])
    others = (beside >= 0) & (beside < len(logs))
    beside = beside.clip(0, len(logs) - 1)
    others &= which[beside] != which[:, None]
    even = np.full((int(rounds.max(initial=-1)) + 1, count), np.nan)
    even[rounds, which] = logs
    for _ in range(4):
        off = logs - np.nanmedian(even, axis=0)[which]
        off -= np.median(off)
        even[rounds, which] = logs - _median(np.where(others, off[beside], np.nan))
    return even


def _rounds(which: Array, count: int) -> Array:
    """Of every time, how many of its model came before."""
    found = np.empty(len(which), dtype=np.int64)
    for k in range(count):
        (places,) = np.nonzero(which == k)
        found[places] = np.arange(len(places))
    return found


def _median(rows: Array) -> Array:
    """Median of every row without NaN; 0 of a row of nothing else."""
    ordered = np.sort(rows, axis=1)  # NaN last
    known = (~np.isnan(rows)).sum(axis=1)
    ends = [
        np.take_along_axis(ordered, np.maximum(k, 0)[:, None], axis=1)[:, 0] for k in ((known - 1) // 2, known // 2)
    ]
    found: Array = np.where(known > 0, (ends[0] + ends[1]) / 2, 0.0)
    return found


def robust(even: Array) -> tuple[Array, Array]:
    """Per model the median over rounds without outliers, and its standard error, both in logarithms.

    Of few rounds the scatter is not well known: it is taken to be that of most models, at least.

    Args:
        even: (rounds, models) logarithms; NaN was not timed.
    """
    middle = np.nanmedian(even, axis=0)
    apart = np.abs(even - middle)
    scatter = 1.4826 * np.nanmedian(apart, axis=0)
    kept = np.where(apart <= 3 * np.where(scatter > 0, scatter, np.inf), even, np.nan)
    scatter = np.maximum(scatter, np.median(scatter))
    error: Array = np.hypot(1.2533 * scatter / np.sqrt((~np.isnan(kept)).sum(axis=0)), _STAYS)
    return np.nanmedian(kept, axis=0), error


@dataclass(eq=False)
class Stopwatch:
    """Measures models, and remembers what it measured on this machine.

    Args:
        runtime: provider and threads.
        cache: file with times of earlier runs; None keeps nothing.
    """

    runtime: Runtime
    cache: Path | None = None
    measured: int = 0  # models that were run, not remembered
    remembered: int = 0
    _machine: str = field(init=False)
    _yardstick: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._machine = machine(self.runtime)

    def times(
        self, models: Mapping[str, onnx.ModelProto], enough: Mapping[str, float] | None = None
    ) -> dict[str, Reading]:
        """Seconds of one run of every model, by signature; a model that the runtime refuses is left out.

        Args:
            models: by signature.
            enough: seconds of standard error that do for a model; no more than a small share of its time is asked for.
        """
        asked = {key: (enough or {}).get(key, 0.0) for key in models}
        found = self._read(asked)
        self.remembered += len(found)
        missing = [key for key in models if key not in found]
        for start in range(0, len(missing), _TOGETHER):
            part = missing[start : start + _TOGETHER]
            new = self._measure({key: models[key] for key in part}, asked)
            self.measured += len(new)
            self._write(new, asked)
            found |= new
        return found

    def once(self, key: str, measure: Callable[[], float]) -> float:
        """Seconds that were measured earlier on this machine, or are now.

        Args:
            key: what they are of.
            measure: gives them.
        """
        known = self._read({key: np.inf}).get(key)
        found = known or Reading(measure())
        self._write({key: found}, {key: 0.0})
        return found.seconds

    def _measure(self, models: Mapping[str, onnx.ModelProto], asked: Mapping[str, float]) -> dict[str, Reading]:
        running = {}
        for key, model in models.items():
            try:
                running[key] = _Running(self.runtime, model)
            except Exception:  # the runtime's errors share no base class; what cannot run alone has no time of its own
                continue
        if not running:
            return {}
        clocks = [_Running(self.runtime, yardstick()), *running.values()]
        enough = np.array([0.0, *(asked[key] for key in running)])
        left, spent, rng = np.arange(1, len(clocks)), np.zeros(len(clocks)), np.random.default_rng(0)
        times: list[float] = []
        which: list[int] = []
        middle = error = np.empty(0)
        for count in range(1, _LOOKED_AT[-1] + 1):
            # what ran before a model counts: it is another one every time, so that it is no fixed part of any time
            for k in rng.permutation([0, *left]).tolist():
                which.append(k)
                times.append(clocks[k].time())
                spent[k] += clocks[k].runs * times[-1]
            if count >= _FEWEST_SLOW:
                left = left[spent[left] < _LONGEST]
            if count in _LOOKED_AT or not len(left):
                middle, error = robust(at_even_pace(np.array(times), np.array(which), len(clocks)))
                # what stays of the error would not become less
                left = left[
                    np.sqrt(error[left] ** 2 - _STAYS**2) > np.maximum(_TIGHT, enough[left] / np.exp(middle[left]))
                ]
            if not len(left):
                break
        seconds = np.exp(middle)
        slowness = seconds[0] / self._usual(float(seconds[0]))
        return {
            key: Reading(float(seconds[k] / slowness), float(error[k] * seconds[k] / slowness))
            for k, key in enumerate(running, start=1)
        }

    def _usual(self, seconds: float) -> float:
        """What the yardstick takes, the same for all that is compared: as found first on this machine."""
        if not self._yardstick:
            known = self._read({"yardstick": 0.0}).get("yardstick")
            self._yardstick = known.seconds if known else seconds
            self._write({"yardstick": Reading(self._yardstick)}, {"yardstick": 0.0})
        return self._yardstick

    # ---------------------------------------------------------------------------------------------------- on disk

    def _read(self, asked: Mapping[str, float]) -> dict[str, Reading]:
        """What is known at least about as exactly as is asked for."""
        if self.cache is None or not self.cache.is_file():
            return {}
        query = "select model, seconds, error, asked from readings where machine = ?"
        try:
            with closing(sqlite3.connect(self.cache, timeout=10)) as store:
                rows = store.execute(query, (self._machine,)).fetchall()
        except sqlite3.Error:  # of another version, or damaged: measured anew
            return {}
        return {
            key: Reading(seconds, error)
            for key, seconds, error, then in rows
            if key in asked and then <= _ALIKE * max(asked[key], _TIGHT * seconds)
        }

    def _write(self, new: Mapping[str, Reading], asked: Mapping[str, float]) -> None:
        if self.cache is None or not new:
            return
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.cache, timeout=10)) as store, store:
                store.execute(_SCHEMA)
                rows = [(self._machine, key, each.seconds, each.error, asked[key]) for key, each in new.items()]
                store.executemany("insert or replace into readings values (?, ?, ?, ?, ?)", rows)
        except (sqlite3.Error, OSError):  # a cache that cannot be written costs time, nothing else
            return


class _Running:
    """A session with its inputs, warmed up."""

    def __init__(self, runtime: Runtime, model: onnx.ModelProto) -> None:
        self.session, self.feeds, self.runtime = runtime.session(model, spinning=True), example(model), runtime
        self.now = runtime.clock
        for count in range(3):
            before = self.now()
            self.session.run(None, self.feeds)
            self.seconds = self.now() - before
            if count and self.seconds > _WARM:
                break
        self.runs = int(np.clip(_STRETCH / max(self.seconds, 1e-6), 1, _MOST_RUNS))

    def time(self) -> float:
        """Seconds of a run, the lower quartile of a few: what disturbs a run only ever adds."""
        self.runtime.take_turn(lambda: self.session.run(None, self.feeds), self.seconds)
        found = []
        for _ in range(self.runs):
            before = self.now()
            self.session.run(None, self.feeds)
            found.append(self.now() - before)
        return sorted(found)[len(found) // 4]


def yardstick() -> onnx.ModelProto:
    """A small convolution that is timed beside all others: the pace at which tables of different days are compared."""
    value, tensor = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    weight = np.random.default_rng(0).standard_normal((32, 32, 3, 3)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])],
        "yardstick",
        [value("x", tensor, [1, 32, 28, 28])],
        [value("y", tensor, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)


def example(model: onnx.ModelProto) -> dict[str, Array]:
    """Inputs of a model whose shapes are known: normal floats, zeros, and true."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value for d in tensor.shape.dim]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        if dtype.kind in "iub":
            feeds[value.name] = np.full(shape, dtype.kind == "b", dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def machine(runtime: Runtime) -> str:
    """What a time holds for, as JSON: provider, its version, processor, threads, clock."""
    return json.dumps(
        {
            "provider": runtime.provider,
            "onnxruntime": ort.__version__,
            "device": _gpu() if runtime.provider in ("cuda", "tensorrt") else _processor(),
            "threads": runtime.thread_count,
            "clock": "thread" if runtime.computes_alone else "wall",
            "version": 5,  # of how is measured
        },
        sort_keys=True,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("vendor_id", "model name", "cpu family", "model", "flags", "Features")
    words = {line.split(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines) if ":" in line}
    return " ".join(words[k] for k in wanted if k in words) or platform.machine()


def _gpu() -> str:
    try:
        name = Path("/proc/driver/nvidia/gpus")
        return " ".join(sorted(p.read_text().split("\n")[0] for p in name.glob("*/information")))
    except OSError:
        return ""


def default_cache() -> Path:
    """Where times are kept."""
    return cache_folder() / "times.sqlite"
