"""Images and their mirror images: where a network answers both alike, few images become twice as many.

Whether it does is seen from its outputs, without labels: what turning an image round changes is set against what
another image changes. Letters, digits and road signs are told apart that way from what has no left and right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from onnxprune.data import Calibration, InputSpec
from onnxprune.divergence import deviation
from onnxprune.images import is_float, model_layout
from onnxprune.progress import Progress

_LOOKED_AT = 32  # records
_ALIKE = 0.2  # of what another image changes

Arrays = Mapping[str, np.ndarray]


def mirror_axes(
    inputs: Sequence[InputSpec], data: Calibration, session: ort.InferenceSession, progress: Progress
) -> dict[str, int]:
    """By its name, the axis along which the one image input may be turned round; empty where the network minds that.

    Args:
        inputs: of the model.
        data: records; some of them are looked at.
        session: of the model.
        progress: told of a stage, where there is something to look at.
    """
    images = [spec for spec in inputs if len(spec.shape) == 4 and is_float(spec.dtype)]
    if len(images) != 1:
        return {}
    name, axis = images[0].name, 3 if model_layout(images[0].shape) == "NCHW" else 2
    names = [output.name for output in session.get_outputs()]

    def answer(feeds: Arrays) -> dict[str, np.ndarray]:
        found = zip(names, session.run(None, feeds), strict=True)
        return {each: a for each, a in found if isinstance(a, np.ndarray)}  # not of lists of tensors

    turned = other = 0.0
    before: Arrays | None = None
    count = min(len(data), _LOOKED_AT)
    with progress.stage("mirror", count):
        for record in range(count):
            feeds = data.feeds([record])
            try:
                found, seen = answer(feeds), answer({**feeds, name: np.ascontiguousarray(np.flip(feeds[name], axis))})
            except Exception:  # onnxruntime's errors share no base class; who needs the answer says what is wrong
                return {}
            turned += _change(found, seen, axis)
            other += deviation(found, before) if before is not None else 0.0
            before = found
            progress.advance()
    return {name: axis} if math.isfinite(other) and turned < _ALIKE * other else {}


def _change(found: Arrays, turned: Arrays, axis: int) -> float:
    """How far the answer to a mirror image is from the answer, or from its mirror image where that is one."""
    back = {name: np.flip(a, axis) if a.ndim == 4 else a for name, a in turned.items()}
    return min(deviation(found, turned), deviation(found, back))
