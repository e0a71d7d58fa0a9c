"""Inputs of the sizes that a network is used with: what latency is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxprune.data import InputSpec
from onnxprune.errors import InputError
from onnxprune.images import fits, shape_text


def deployed_feeds(
    inputs: Sequence[InputSpec],
    sample: Mapping[str, np.ndarray],
    shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int | None = None,
) -> dict[str, np.ndarray]:
    """Inputs to time a model on: a sample, repeated or replaced by noise where other sizes are asked for.

    Args:
        inputs: of the model.
        sample: one record of the data.
        shapes: per input name the whole shape; others keep the sample's.
        batch: size of the first axis of every input that leaves it open.

    Raises:
        InputError: the model does not have such an input, or does not take such a size.
    """
    given = dict(shapes or {})
    known = {spec.name for spec in inputs}
    for name in given:
        if name not in known:
            raise InputError(f"--shape names an input {name!r}; the model's inputs are {', '.join(sorted(known))}")
    if batch is not None and batch < 1:
        raise InputError(f"expected a batch of at least 1, found {batch}")
    if batch is not None and not any(spec.shape[:1] == (None,) for spec in inputs):
        raise InputError("--batch: no input of the model leaves its first axis open; export it with a dynamic batch")
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in inputs:
        array = sample[spec.name]
        shape = tuple(given.get(spec.name, array.shape))
        if batch is not None and spec.shape[:1] == (None,) and spec.name not in given:
            shape = (batch, *shape[1:])
        if not fits(spec.shape, shape) or min(shape, default=1) < 1:
            raise InputError(f"--shape: input {spec.name!r} takes {shape_text(spec.shape)}, found {shape_text(shape)}")
        if shape[1:] == array.shape[1:] and shape:
            array = np.resize(array, shape)  # whole records, again and again
        elif shape != array.shape and spec.dtype.kind not in "iub":
            array = rng.standard_normal(shape).astype(spec.dtype)
        elif shape != array.shape:
            array = np.resize(array, shape)
        feeds[spec.name] = np.asarray(array, order="C")
    return feeds
