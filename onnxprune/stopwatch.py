"""Times of many small models: interleaved, warmed up, robust, stopped when tight enough, and kept on disk."""

from __future__ import annotations

import json
import platform
import sqlite3
from collections.abc import Mapping, Sequence
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
_ROUNDS = (6, 30)  # fewest and most
_FEWEST_SLOW, _LONGEST = 3, 0.4  # rounds that a model gets that takes longer than so many seconds in all
_LOOKED_AT = 3  # every so many rounds it is seen which are done
_STRETCH = 1e-3  # seconds of runs of one model per round
_MOST_RUNS = 24  # per round
_TIGHT = 0.006  # relative standard error at which a model is done
_SCHEMA = "create table if not exists times (machine text, model text, seconds real, primary key (machine, model))"


def robust(values: Sequence[float] | Array) -> tuple[float, float]:
    """Median without outliers (beyond three times the median deviation) and NaN, and its relative standard error.

    >>> robust([1.0, 1.1, 1.0, 0.9, 50.0])[0]
    1.0
    """
    given = np.asarray(values, dtype=np.float64)
    given = given[~np.isnan(given)]
    middle = float(np.median(given))
    spread = float(np.median(np.abs(given - middle)))
    kept = given[np.abs(given - middle) <= 3 * 1.4826 * spread] if spread else given
    middle = float(np.median(kept))
    return middle, 1.2533 * 1.4826 * spread / np.sqrt(len(kept)) / middle if middle else 0.0


def at_even_pace(seconds: Array) -> Array:
    """Times as if every round had run at the same pace: the median over rounds. Rows are rounds; NaN was not timed.

    >>> at_even_pace(np.array([[1.0, 10.0, 5.0], [1.2, 12.0, 6.0], [1.0, np.nan, 5.0]]))[1].round(9).tolist()
    [1.0, 10.0, 5.0]
    """
    found = np.log(seconds)
    for _ in range(3):  # medians of columns and rows in turns (Tukey's median polish)
        found = found - np.nanmedian(found - np.nanmedian(found, axis=0), axis=1, keepdims=True)
    return np.exp(found)


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

    def times(self, models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        """Seconds of one run of every model, by signature; a model that the runtime refuses is left out.

        Args:
            models: by signature.
        """
        found = self._read(list(models))
        self.remembered += len(found)
        missing = [key for key in models if key not in found]
        for start in range(0, len(missing), _TOGETHER):
            part = missing[start : start + _TOGETHER]
            new = self._measure({key: models[key] for key in part})
            self.measured += len(new)
            self._write(new)
            found |= new
        return found

    def _measure(self, models: Mapping[str, onnx.ModelProto]) -> dict[str, float]:
        running = {}
        for key, model in models.items():
            try:
                running[key] = _Running(self.runtime, model)
            except Exception:  # the runtime's errors share no base class; what cannot run alone has no time of its own
                continue
        if not running:
            return {}
        keys = list(running)
        clocks = [_Running(self.runtime, yardstick()), *running.values()]
        values = np.full((_ROUNDS[1], len(clocks)), np.nan)
        left, spent, rng = np.arange(1, len(clocks)), np.zeros(len(clocks)), np.random.default_rng(0)
        for round_number in range(_ROUNDS[1]):
            # what ran before a model counts: it is another one every time, so that it is no fixed part of any time
            for k in rng.permutation([0, *left]):
                values[round_number, k] = clocks[k].time()
                spent[k] += clocks[k].runs * values[round_number, k]
            if round_number + 1 >= _ROUNDS[0] and round_number % _LOOKED_AT == 0:
                even = at_even_pace(values[: round_number + 1])
                left = np.array([k for k in left if robust(even[:, k])[1] > _TIGHT], dtype=np.int64)
            if round_number + 1 >= _FEWEST_SLOW:
                left = left[spent[left] < _LONGEST]
            if not len(left):
                break
        even = at_even_pace(values[: round_number + 1])
        slowness = robust(even[:, 0])[0] / self._usual(robust(even[:, 0])[0])
        return {key: robust(even[:, k])[0] / slowness for k, key in enumerate(keys, start=1)}

    def _usual(self, seconds: float) -> float:
        """What the yardstick takes, the same for all that is compared: as found first on this machine."""
        if not self._yardstick:
            self._yardstick = self._read(["yardstick"]).get("yardstick", 0.0) or seconds
            self._write({"yardstick": self._yardstick})
        return self._yardstick

    # ---------------------------------------------------------------------------------------------------- on disk

    def _read(self, keys: Sequence[str]) -> dict[str, float]:
        if self.cache is None or not self.cache.is_file():
            return {}
        try:
            with closing(sqlite3.connect(self.cache, timeout=10)) as store:
                rows = store.execute("select model, seconds from times where machine = ?", (self._machine,)).fetchall()
        except sqlite3.Error:  # of another version, or damaged: measured anew
            return {}
        known = dict(rows)
        return {key: known[key] for key in keys if key in known}

    def _write(self, new: Mapping[str, float]) -> None:
        if self.cache is None or not new:
            return
        try:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.cache, timeout=10)) as store, store:
                store.execute(_SCHEMA)
                rows = [(self._machine, key, seconds) for key, seconds in new.items()]
                store.executemany("insert or replace into times values (?, ?, ?)", rows)
        except (sqlite3.Error, OSError):  # a cache that cannot be written costs time, nothing else
            return


class _Running:
    """A session with its inputs, warmed up."""

    def __init__(self, runtime: Runtime, model: onnx.ModelProto) -> None:
        self.session, self.feeds, self.runtime = runtime.session(model, spinning=True), example(model), runtime
        self.now = runtime.clock
        for _ in range(3):
            before = self.now()
            self.session.run(None, self.feeds)
            self.seconds = self.now() - before
        self.runs = int(np.clip(_STRETCH / max(self.seconds, 1e-6), 1, _MOST_RUNS))

    def time(self) -> float:
        """Median seconds of a few runs."""
        self.runtime.take_turn(lambda: self.session.run(None, self.feeds), self.seconds)
        found = []
        for _ in range(self.runs):
            before = self.now()
            self.session.run(None, self.feeds)
            found.append(self.now() - before)
        return float(np.median(found))


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
            "version": 4,  # of how is measured
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
