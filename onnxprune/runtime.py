"""Sessions: the one place that builds onnxruntime's objects."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxprune.errors import InputError
from onnxprune.images import is_float
from onnxprune.precision import float32_copy, types
from onnxprune.tensors import detached, graphs

ort.set_default_logger_severity(4)  # GPU builds warn about missing drivers on machines without one

_SLICE_BYTES = 192 << 20  # of the tensors of a model that are looked at together
_SPINNING = 0.0002  # seconds that a measured session's workers look for more work before they sleep
_WAKING = 0.00015  # seconds that they may take to wake up
_WAKING_SHOWS = 0.01  # seconds; in runs that take longer it does not matter whether workers slept before
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "dml": "DmlExecutionProvider",
}
_BEHIND = {"tensorrt": ("cuda",)}  # what takes the nodes that a provider leaves


@dataclass(frozen=True)
class Runtime:
    """How models are run.

    Attributes:
        provider: its short name.
        threads: how many (0: the runtime's own choice).
        as_float32: whether models are run as copies in float32, for want of kernels for their own types; inputs of
            other types are converted, and what is a float in the model comes out in float32.
        hoards: whether a session keeps the memory that it once needed, which makes its next run faster.
        fallen: said of sessions that came up on another provider, or unoptimised; shared with all that is made from
            this one.
    """

    provider: str = "cpu"
    threads: int = 0
    as_float32: bool = False
    hoards: bool = True
    fallen: list[str] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise InputError(f"unknown provider {self.provider!r}; expected one of {', '.join(PROVIDERS)}")
        if PROVIDERS[self.provider] not in ort.get_available_providers():
            have = [k for k, v in PROVIDERS.items() if v in ort.get_available_providers()]
            raise InputError(
                f"provider {self.provider!r} is not in this build of onnxruntime; it offers {', '.join(have)}"
            )
        if self.threads < 0:
            raise InputError(f"expected a number of threads of at least 0, found {self.threads}; 0 is one per core")

    def suited(self, model: onnx.ModelProto) -> Runtime:
        """This runtime, or one that runs the model in float32 where there are no kernels for its own types.

        Raises:
            InputError: onnxruntime refuses the model in either form.
        """
        return self.ready(model)[0]

    def ready(self, model: onnx.ModelProto) -> tuple[Runtime, ort.InferenceSession]:
        """The runtime that suits a model, as `suited` finds it, and a session that runs the model as it stands.

        Raises:
            InputError: onnxruntime refuses the model in either form.
        """
        wide = replace(self, as_float32=True)
        found = types(model)
        if onnx.TensorProto.BFLOAT16 in found:  # which NumPy does not know either
            return wide, wide.session(model, optimise=False)
        try:
            return self, self.session(model, optimise=False)
        except InputError:
            if onnx.TensorProto.DOUBLE not in found:
                raise
            return wide, wide.session(model, optimise=False)

    def feeds(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs in the types that a session of this runtime takes."""
        if not self.as_float32:
            return dict(feeds)
        return {name: a.astype(np.float32) if is_float(a.dtype) else a for name, a in feeds.items()}

    @property
    def thread_count(self) -> int:
        """Threads that a session uses."""
        return self.threads or os.cpu_count() or 1

    def shared_out(self, parts: int) -> tuple[int, Runtime]:
        """How many parts of the work to do at a time, and the runtime of each, with its share of the threads."""
        at_once = min(parts, self.thread_count) if self.provider == "cpu" else 1
        return at_once, replace(self, threads=max(self.thread_count // at_once, 1))

    @property
    def computes_alone(self) -> bool:
        """Whether models run on the calling thread and nowhere else."""
        return self.provider == "cpu" and self.thread_count == 1

    @property
    def clock(self) -> Callable[[], float]:
        """The clock to compare models by, in seconds.

        Where the calling thread computes alone, its own processor time: what other processes take meanwhile is not the
        model's. Else the time on the wall.
        """
        return time.thread_time if self.computes_alone else time.perf_counter

    def take_turn(self, run: Callable[[], object], seconds: float) -> None:
        """Before a model is timed that others were run beside: their workers go to sleep, and its own wake up.

        Workers that wait for work keep a core busy. Those of one model take it from the next one; but in a program that
        runs one model again and again, it finds its own awake.

        Args:
            run: runs the model.
            seconds: that it takes, or nan where that is not known.
        """
        if not self.computes_alone:
            time.sleep(1.2 * _SPINNING)
            awake = time.perf_counter() + _WAKING
            while not seconds > _WAKING_SHOWS:
                run()
                if time.perf_counter() > awake:
                    break

    def session(
        self, model: onnx.ModelProto | bytes, *, optimise: bool = True, spinning: bool = False
    ) -> ort.InferenceSession:
        """A session for the model; ``spinning`` is the runtime's default, for measuring what users get (`take_turn`).

        Raises:
            InputError: onnxruntime refuses the model.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.thread_count
        options.inter_op_num_threads = 1
        # spinning worker threads would fight with BLAS for the same cores
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        if spinning:
            options.add_session_config_entry("session.intra_op.spin_duration_us", str(round(1e6 * _SPINNING)))
        options.enable_cpu_mem_arena = self.hoards and optimise
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if self.as_float32:
            model = float32_copy(onnx.load_from_string(model) if isinstance(model, bytes) else model)
        values: dict[str, np.ndarray] = {}
        if isinstance(model, onnx.ModelProto):
            model, values = detached(model) if optimise else detached(model, 0)  # run once or twice: nothing is copied
            if values:  # a stored tensor that nothing reads is gone before its values come
                read = {name for graph in graphs(model) for node in graph.node for name in node.input}
                read |= {value.name for value in model.graph.output}
                values = {name: array for name, array in values.items() if name in read}
        given = {name: ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C")) for name, array in values.items()}
        options.add_external_initializers(list(given), list(given.values()))
        if values and not optimise:
            options.add_session_config_entry("session.disable_prepacking", "1")
        data = model if isinstance(model, bytes) else model.SerializeToString()
        try:
            session = self._start(data, options)
        except InputError:
            if not optimise:
                raise
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = self._start(data, options)
            self._note("onnxruntime fails to optimise the model, which was run as it stands")
        session.given = given  # the session reads what these hold
        return session

    def _start(self, data: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        """On the provider, or on the next best that comes up, which is noted."""
        kind = _Float32Session if self.as_float32 else ort.InferenceSession
        names = list(dict.fromkeys([self.provider, *_BEHIND.get(self.provider, ()), "cpu"]))
        names = [name for name in names if PROVIDERS[name] in ort.get_available_providers()]
        while True:
            providers = [PROVIDERS[name] for name in names]
            try:
                session = kind(data, options, providers=providers, enable_fallback=0)
                break
            except Exception as error:  # onnxruntime's errors share no public base class
                names.pop(0)
                if not names:
                    raise InputError(f"onnxruntime refuses the model: {_first_line(error)}") from error
        found = session.get_providers()
        if PROVIDERS[self.provider] not in found:
            came = next((name for name, provider in PROVIDERS.items() if provider in found), found[0])
            self._note(f"provider {self.provider!r} did not come up on this machine: models were run on {came!r}")
        return session

    def _note(self, said: str) -> None:
        if said not in self.fallen:
            self.fallen.append(said)


class _Float32Session(ort.InferenceSession):  # type: ignore[misc]
    """A session over a copy in float32, that takes what the model itself takes."""

    def run(self, output_names: Any, input_feed: Mapping[str, np.ndarray], run_options: Any = None) -> Any:
        return super().run(output_names, Runtime(as_float32=True).feeds(input_feed), run_options)


def in_slices(sizes: Mapping[str, int], run: Callable[[tuple[str, ...]], Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """What a model gives for many tensors: some at a time, with a run for each slice, so that little is held at once.

    Args:
        sizes: bytes of the tensors, or about so many.
        run: from some of the names to their arrays, or the runtime's own values, by a session that has no other
            outputs: the runtime holds them all until the end of a run, whether they are asked for or not.
    """
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > _SLICE_BYTES:
            yield from zip(names, run(tuple(names)), strict=True)
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield from zip(names, run(tuple(names)), strict=True)


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
