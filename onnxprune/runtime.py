"""Sessions: the one place that builds onnxruntime's objects."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnxruntime as ort

from onnxprune.errors import InputError

ort.set_default_logger_severity(4)  # GPU builds warn about missing drivers on machines without one

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
}


@dataclass(frozen=True)
class Runtime:
    """How models are run: the provider's short name and the number of threads (0: the runtime's own choice)."""

    provider: str = "cpu"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise InputError(f"unknown provider {self.provider!r}; expected one of {', '.join(PROVIDERS)}")
        if PROVIDERS[self.provider] not in ort.get_available_providers():
            have = [k for k, v in PROVIDERS.items() if v in ort.get_available_providers()]
            raise InputError(
                f"provider {self.provider!r} is not in this build of onnxruntime; it offers {', '.join(have)}"
            )

    def session(
        self, model: onnx.ModelProto | bytes, *, optimise: bool = True, spinning: bool = False
    ) -> ort.InferenceSession:
        """A session for the model; ``spinning`` is the runtime's default, for measuring what users get.

        Raises:
            InputError: onnxruntime refuses the model.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.threads or os.cpu_count() or 1
        options.inter_op_num_threads = 1
        # spinning worker threads would fight with BLAS for the same cores
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = model if isinstance(model, bytes) else model.SerializeToString()
        providers = [PROVIDERS[self.provider]]
        if self.provider != "cpu":
            providers.append(PROVIDERS["cpu"])
        try:
            return ort.InferenceSession(data, options, providers=providers)
        except Exception as error:  # onnxruntime's errors share no public base class
            raise InputError(f"onnxruntime refuses the model: {_first_line(error)}") from error


def expose(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """A copy whose outputs are exactly the named tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    return copy


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
