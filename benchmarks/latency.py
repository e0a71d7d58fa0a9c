"""The promise about time, kept or not: one command, one table.

    python benchmarks/latency.py [--part promise,curves,second,browser] [--nets resnet56,vgg] [--shared ../shared]

promise: every network at 1.5x and 2x, with one thread and two, batch 1 and 8: what was asked for, and the ratio of the
finished file to the original, measured in turns, with its 95 % interval. The widths are chosen by measured damage on a
few samples and the weights are only cut (--no-reconstruct), which does not change the time.
curves: accuracy where the budget is spent on time, and where it is spent on MACs, with the least speed-up in MACs whose
models take no longer.
second: the finished models on a second runtime, OpenVINO, where it is installed: its outputs against onnxruntime's.
browser: the finished models and their originals in headless Chromium, by onnxruntime-web's WebAssembly on one thread,
where `--web` names the node_modules of a folder in which `npm install onnxruntime-web` ran and a browser is installed.

Writes benchmarks/latency.md and benchmarks/latency.json; rows of other runs stay in them. The clock of one thread is
its own processor time, so that a busy machine does not decide the outcome; two threads need a quiet one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from accuracy import Case, accuracy, cifar, digits, squeezenet
from latency_browser import in_browser, missing
from onnx import TensorProto, helper, numpy_helper

from onnxprune.cli import main as command
from onnxprune.cost import Ratio, measure_ratio
from onnxprune.graph import read_model
from onnxprune.runtime import Runtime

HERE = Path(__file__).parent
_GRID = 20  # speed-ups in MACs, up to 9.5x, that are tried for an equal time
Rows = dict[str, dict[str, Any]]


# ---------------------------------------------------------------------------------------------------- own networks


class Net:
    """A network in the making, with random weights that keep the activations' size."""

    def __init__(self, size: int) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.last, self.channels, self.size = "input", 3, size

    def add(self, op: str, *inputs: str, **attributes: Any) -> None:
        name = f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *inputs], [name], name=name, **attributes))
        self.last = name

    def weight(self, *shape: int, fan: int) -> str:
        name = f"w{len(self.weights)}"
        array = self.rng.standard_normal(shape) * np.sqrt(2 / fan)
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def conv(self, out: int, k: int = 3, stride: int = 1, *, depthwise: bool = False, top: float | None = None) -> None:
        """A convolution and its activation: Relu, or Clip to [0, top]."""
        group = self.channels if depthwise else 1
        fan = self.channels // group * k * k
        weight = self.weight(out, self.channels // group, k, k, fan=fan)
        self.add("Conv", weight, pads=[k // 2] * 4, strides=[stride] * 2, group=group)
        self.channels = out
        if top is None:
            self.add("Relu")
        else:
            limits = [f"lim{len(self.weights)}_{k}" for k in range(2)]
            pairs = zip((0.0, top), limits, strict=True)
            self.weights += [numpy_helper.from_array(np.float32(v), n) for v, n in pairs]
            self.add("Clip", *limits)

    def pool(self) -> None:
        self.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])

    def model(self, classes: int) -> onnx.ModelProto:
        self.add("GlobalAveragePool")
        self.add("Flatten")
        self.add("Gemm", self.weight(classes, self.channels, fan=self.channels), transB=1)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "net",
            [value("input", TensorProto.FLOAT, ["N", 3, self.size, self.size])],
            [value(self.last, TensorProto.FLOAT, ["N", classes])],
            self.weights,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def vgg() -> onnx.ModelProto:
    """A plain network in the manner of VGG."""
    net = Net(64)
    for width in (32, 64, 128, 256):
        net.conv(width)
        net.conv(width)
        net.pool()
    return net.model(10)


def mobilenet() -> onnx.ModelProto:
    """Depthwise and pointwise convolutions in turns, in the manner of MobileNet."""
    net = Net(96)
    net.conv(32, stride=2, top=6.0)
    for out, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1)):
        net.conv(net.channels, stride=stride, depthwise=True, top=6.0)
        net.conv(out, 1, top=6.0)
    return net.model(10)


def networks(shared: Path, folder: Path) -> list[Case]:
    """All networks; those of the shared folder where it is."""
    found = [digits("digits_resnet")]
    if (shared / "models/resnet56.onnx").is_file():
        images = folder / "images"
        images.mkdir()
        found += [cifar("resnet20", shared), cifar("resnet56", shared), squeezenet(shared, images)]
    for make in (vgg, mobilenet):
        model, size = make(), 64 if make is vgg else 96
        onnx.save(model, folder / f"{make.__name__}.onnx")
        data = np.random.default_rng(1).standard_normal((64, 3, size, size)).astype(np.float32)
        np.save(folder / f"{make.__name__}.npy", data)
        path = folder / f"{make.__name__}.onnx"
        found.append(
            Case(make.__name__, path, ("--data", str(path.with_suffix(".npy"))), lambda: (np.empty(0), np.empty(0)))
        )
    return found


# ----------------------------------------------------------------------------------------------------------- parts


def prune(case: Case, output: Path, *options: object) -> dict[str, Any] | None:
    """The command line; its report, or None where it says that the ratio cannot be reached."""
    report = output.with_suffix(".json")
    output.parent.mkdir(exist_ok=True)
    given = [*case.options, "--quiet", "--force", "-o", output, "--report", report, *options]
    status = command([str(case.model), *map(str, given)])
    if status not in (0, 3):
        raise SystemExit(status)
    return json.loads(report.read_text()) if status == 0 and report.is_file() else None


def promise(case: Case, speedup: float, threads: int, batch: int, samples: int, folder: Path) -> dict[str, Any]:
    """One case of the promise."""
    start = time.time()
    row: dict[str, Any] = {"network": case.name, "asked": speedup, "threads": threads, "batch": batch}
    options = ("--by", "latency", "--threads", threads, "--batch", batch, "--samples", samples, "--no-reconstruct")
    report = prune(case, folder / "promise.onnx", "--speedup", speedup, *options)
    if report is None:
        return row | {"ratio": "cannot be reached", "seconds": round(time.time() - start)}
    found = report["latency"]
    return row | {
        **{k: found["measured"][k] for k in ("ratio", "low", "high", "clock")},
        "macs": report["achieved"]["macs"],
        "rounds": len(found["rounds"]),
        "table s": round(report["timings"]["time layers"], 1),
        "times": f"{found['models_measured']} + {found['models_remembered']} cached",
        "seconds": round(time.time() - start),
    }


def curve(
    case: Case, speedup: float, by: str, threads: int, samples: int, folder: Path, asked: float | None = None
) -> dict[str, Any]:
    """One point: accuracy, and the time of the finished model against the original's, measured in turns."""
    path = folder / f"{case.name}-{by}-{speedup:g}.onnx"
    options = ("--speedup", speedup, "--by", by, "--threads", threads, "--samples", samples)
    row = {"network": case.name, "by": by, "asked": asked or speedup, "threads": threads, "samples": samples}
    report = prune(case, path, *options)
    if report is None:
        return row | {"ratio": "cannot be reached"}
    return row | seen(case, path, threads) | {"macs": report["achieved"]["macs"]}


def seen(case: Case, path: Path, threads: int) -> dict[str, Any]:
    """Measured ratio and accuracy of a finished model."""
    after, count = accuracy(path, case.test())
    found = measured(case, read_model(path), threads, 8.0)
    row = {"ratio": found.ratio, "low": found.low, "high": found.high, "clock": found.clock}
    return row | {"accuracy": f"{100 * after:.2f} %", "images": count}


def measured(case: Case, model: onnx.ModelProto, threads: int, seconds: float) -> Ratio:
    """How many times less than the original's the time of a model is, on one image."""
    name, x = sample(model)
    return measure_ratio(read_model(case.model), model, {name: x}, Runtime("cpu", threads), seconds=seconds)


def macs_for(case: Case, ratio: float, threads: int, samples: int, folder: Path) -> float | None:
    """The least of some speed-ups in MACs with which the model, only cut, reaches a measured ratio."""
    cuts = folder / "cuts"
    grid = [round(1.1 * 1.12**k, 2) for k in range(_GRID)]
    asked = ("--speedup", ",".join(map(str, grid)), "--best-effort")
    prune(case, cuts / "{speedup}.onnx", *asked, "--samples", samples, "--threads", threads, "--no-reconstruct")
    for speedup in grid:
        path = cuts / f"{speedup:g}.onnx"
        if path.is_file() and measured(case, read_model(path), threads, 2.0).ratio >= ratio:
            return speedup
    return None


def sample(model: onnx.ModelProto) -> tuple[str, np.ndarray]:
    """One random input of a model with one image as its input."""
    spec = model.graph.input[0]
    shape = [d.dim_value or 1 for d in spec.type.tensor_type.shape.dim]
    return spec.name, np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def second(path: Path) -> dict[str, Any]:
    """A finished model on OpenVINO: the largest difference of its outputs, relative, and times on one thread."""
    import openvino

    core, model = openvino.Core(), read_model(path)
    name, x = sample(model)
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(str(path)), "CPU", options).create_infer_request()
    session = Runtime("cpu", 1).session(model, spinning=True)
    calls: dict[str, Callable[[], Any]] = {
        "onnxruntime": lambda: session.run(None, {name: x})[0],
        "openvino": lambda: next(iter(request.infer({name: x}).values())),
    }
    ours, theirs = (call() for call in calls.values())
    times: dict[str, list[float]] = {key: [] for key in calls}
    for _ in range(200):
        for key, call in calls.items():
            before = time.perf_counter()
            call()
            times[key].append(1000 * (time.perf_counter() - before))
    gap = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    # the lower quartile: other processes only ever add
    found = {f"{key} ms": float(np.percentile(each, 25)) for key, each in times.items()}
    return {"network": path.stem, "largest relative difference": gap, "openvino": openvino.__version__, **found}


def browser(original: Path, pruned: Path, modules: Path) -> dict[str, Any]:
    """A finished model and its original in a browser: times, and how far the outputs are from onnxruntime's."""
    name, x = sample(read_model(pruned))
    before, after = in_browser([original, pruned], name, x, modules)
    gap = "largest relative difference"
    row = {"network": pruned.stem, gap: max(before.pop(gap), after.pop(gap))}
    milliseconds = [before.pop("ms"), after.pop("ms")]
    row |= {"original ms": milliseconds[0], "pruned ms": milliseconds[1], "ratio": milliseconds[0] / milliseconds[1]}
    return row | after


# ----------------------------------------------------------------------------------------------------------- tables

_MISSING = """Not measured yet: a GPU (none was at hand). One thread's clock is its own processor time; that of two
is the wall's, on a machine with nothing else running. `rounds` are measurements of cut networks, the fastest one
first. One-thread rows and curves of a processor without AVX-512 are from a machine with other work on both cores. What
is compared has to be of one machine, as each pair of curves is. All curves but SqueezeNet's are from before an
interval was that of fresh sessions: theirs are of one session's runs, and narrower. The second runtime's and the
browser's times are lower quartiles of a busy machine; the outputs are what counts there. Models called `-cut` are
not fitted.

In the curves every row with the same `asked` is to take the same measured time:
`macs` is the least speed-up in MACs that is as fast (but for ResNet-20, where it is what was asked for)."""


def text(found: dict[str, Rows]) -> str:
    """All that was measured, as Markdown."""
    lines = ["# Latency", "", "Made by `python benchmarks/latency.py`; every row with its machine.", "", _MISSING, ""]
    for part, rows in found.items():
        keys = list(dict.fromkeys(k for row in rows.values() for k in row))
        lines += [f"## {part}", "", f"| {' | '.join(keys)} |", "|" + " --- |" * len(keys)]
        for row in rows.values():
            cells = [row.get(k, "") for k in keys]
            lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
        lines.append("")
        if part == "promise":
            numbers = [r for r in rows.values() if isinstance(r["ratio"], float)]
            kept = [abs(r["ratio"] / r["asked"] - 1) <= 0.05 for r in numbers]
            vague = [r["high"] / r["low"] > 1.05 / 0.95 for r in numbers]
            wide = f" Of {sum(vague)} the interval is too wide to say it for certain." if any(vague) else ""
            lines += [f"Within 5 % of what was asked for: {sum(kept)} of {len(kept)} that can be reached.{wide}", ""]
    return "\n".join(lines)


class Tables:
    """All that was measured, in latency.json and latency.md; rows of other runs stay."""

    store = HERE / "latency.json"

    @property
    def found(self) -> dict[str, Rows]:
        """All rows by part, as they are on disk."""
        return json.loads(self.store.read_text()) if self.store.is_file() else {}

    def note(self, part: str, key: str, row: dict[str, Any]) -> None:
        """A row, with the machine, written at once."""
        where = {"machine": f"{_processor()}, {os.cpu_count()} cores", "onnxruntime": ort.__version__}
        found = self.found
        found.setdefault(part, {})[key] = row | where | {"date": str(datetime.date.today())}
        print(part, json.dumps(row), flush=True)
        self.store.write_text(json.dumps(found, indent=1) + "\n")
        (HERE / "latency.md").write_text(text(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="promise,curves,second,browser")
    parser.add_argument("--nets", default="digits,resnet20,resnet56,squeezenet,vgg,mobilenet")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--speedups", default="1.5,2")
    parser.add_argument("--samples", type=int, default=64, help="of the promise")
    parser.add_argument("--curve-samples", type=int, default=500)
    parser.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    parser.add_argument("--keep", type=Path, help="folder for the finished models")
    parser.add_argument("--web", type=Path, help="node_modules with onnxruntime-web")
    options = parser.parse_args()
    note = Tables().note
    parts, nets = options.part.split(","), options.nets.split(",")
    speedups = [float(x) for x in options.speedups.split(",")]
    threads = [int(x) for x in options.threads.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cases = [c for c in networks(options.shared, Path(temporary)) if any(map(c.name.startswith, nets))]
        for case in cases:
            if "promise" in parts:
                for count in threads:
                    for batch in (int(x) for x in options.batch.split(",")):
                        for speedup in speedups:
                            row = promise(case, speedup, count, batch, options.samples, Path(temporary))
                            note("promise", f"{case.name} {speedup:g}x {count} threads batch {batch}", row)
            if "curves" in parts and len(case.test()[1]):
                for speedup in speedups:
                    row = curve(case, speedup, "latency", threads[0], options.curve_samples, folder)
                    note("curves", f"{case.name} latency {speedup:g}x", row)
                    if not isinstance(row["ratio"], float):
                        continue
                    equal = macs_for(case, row["ratio"], threads[0], options.curve_samples, Path(temporary))
                    row = {"network": case.name, "by": "macs", "asked": speedup, "ratio": "not at any MACs tried"}
                    if equal is not None:
                        row = curve(case, equal, "macs", threads[0], options.curve_samples, folder, speedup)
                    note("curves", f"{case.name} macs for {speedup:g}x", row)
        if "browser" in parts and missing(options.web):
            print(f"nothing in a browser: {missing(options.web)}")
            parts.remove("browser")
        for case in cases:
            for path in sorted(folder.glob(f"{case.name}-*.onnx")):
                if "second" in parts:
                    note("second runtime", path.stem, second(path))
                if "browser" in parts:
                    note("browser", path.stem, browser(case.model, path, options.web))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    words = dict((part.strip() for part in line.split(":", 1)) for line in lines if ":" in line)
    flags = " with AVX-512" if "avx512f" in words.get("flags", "") else ""
    return f"{words.get('model name', platform.machine())}{flags}"


if __name__ == "__main__":
    main()
