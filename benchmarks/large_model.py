"""A model beyond protobuf's two gigabytes, generated, pruned and written: time and memory.

    python benchmarks/large_model.py FOLDER [--layers 9] [--width 8192]

FOLDER takes the model, what is made of it, and the temporary files in between: about four times its size. The peak is
that of the process, and maps of files count as far as their pages are in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper
from peak import peak_mib

import onnxprune
from onnxprune.graph import read_model
from onnxprune.tensors import size_of


def generate(folder: Path, layers: int, width: int) -> Path:
    """A perceptron whose weights are bands of random numbers, written one by one."""
    rng = np.random.default_rng(0)
    nodes, tensors, x = [], [], "x"
    with (folder / "weights.bin").open("wb") as file:
        for k in range(layers):
            weight = np.zeros((width, width), np.float32)
            weight[:, rng.integers(0, width, 64)] = rng.standard_normal((width, 64)).astype(np.float32) / 8
            tensor = TensorProto(name=f"w{k}", data_type=TensorProto.FLOAT, dims=weight.shape)
            for key, value in (("location", "weights.bin"), ("offset", file.tell()), ("length", weight.nbytes)):
                tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=str(value)))
            tensor.data_location = TensorProto.EXTERNAL
            weight.tofile(file)
            tensors.append(tensor)
            nodes += [helper.make_node("MatMul", [x, f"w{k}"], [f"m{k}"], name=f"layer{k}")]
            x = f"m{k}"
            if k + 1 < layers:
                nodes += [helper.make_node("Relu", [x], [f"r{k}"])]
                x = f"r{k}"
    faces = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "large", faces[:1], faces[1:], tensors)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    (folder / "large.onnx").write_bytes(model.SerializeToString())
    return folder / "large.onnx"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--width", type=int, default=8192)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(options.folder)
    path = generate(options.folder, options.layers, options.width)
    start = time.perf_counter()
    data = np.random.default_rng(1).standard_normal((16, options.width)).astype(np.float32)
    result = onnxprune.prune(path, speedup=2, data=data, select="l1", reconstruct=False, threads=1)
    result.save(path.with_name("large.pruned.onnx"), force=True)
    seconds = time.perf_counter() - start
    again = read_model(path.with_name("large.pruned.onnx"))
    print(f"{size_of(read_model(path)) / 2**30:.2f} GiB -> {size_of(again) / 2**30:.2f} GiB in {seconds:.0f} s")
    print(f"peak memory {peak_mib() / 2**10:.2f} GiB; proof {result.report.proof}")
    print("files left:", sorted(file.name for file in options.folder.iterdir()))


if __name__ == "__main__":
    main()
