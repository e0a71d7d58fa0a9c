"""Export Keras networks with random weights by tf2onnx (of Keras, of a function, of TFLite) and by Keras itself.

    python benchmarks/coverage_keras.py FOLDER [--only REGEX]

For `coverage.py`. Needs tensorflow and tf2onnx; nothing else of the project does. A file that exists is kept; what an
exporter refuses leaves a `.failed` file with its words.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
import tensorflow as tf
import tf2onnx
from coverage_writing import is_done, write_apart
from keras import layers

Tensor = object


def _conv(x: Tensor, width: int, size: int = 3, stride: int = 1, **options: object) -> Tensor:
    x = layers.Conv2D(width, size, stride, padding="same", use_bias=False, **options)(x)
    return layers.ReLU()(layers.BatchNormalization()(x))


def _residual() -> keras.Model:
    x = image = keras.Input((32, 32, 3))
    x = _conv(x, 16)
    for width, stride in ((16, 1), (32, 2), (48, 2)):
        y = layers.BatchNormalization()(layers.Conv2D(width, 3, 1, padding="same")(_conv(x, width, 3, stride)))
        x = layers.ReLU()(layers.Add()([y, layers.Conv2D(width, 1, stride)(x)]))
    return keras.Model(image, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def _unet() -> keras.Model:
    x = image = keras.Input((None, None, 3))
    kept = []
    for width in (16, 32):
        x = _conv(_conv(x, width), width)
        kept.append(x)
        x = layers.MaxPooling2D()(x)
    x = _conv(x, 48)
    for width, beside in zip((32, 16), reversed(kept), strict=True):
        x = layers.Conv2DTranspose(width, 2, 2, padding="same")(x)
        x = _conv(layers.Concatenate()([x, beside]), width)
    return keras.Model(image, layers.Conv2D(2, 1, activation="softmax")(x))


def _excited() -> keras.Model:
    """Inverted residuals with gates: by Dense on a Reshape, and by convolutions on a kept mean."""
    x = image = keras.Input((48, 48, 3))
    x = layers.Activation("swish")(layers.BatchNormalization()(layers.Conv2D(16, 3, 2, padding="same")(x)))
    for k, width in enumerate((24, 24, 32)):
        y = layers.Activation("swish")(layers.BatchNormalization()(layers.Conv2D(4 * width, 1)(x)))
        y = layers.ReLU(6.0)(layers.BatchNormalization()(layers.DepthwiseConv2D(3, padding="same")(y)))
        if k % 2:
            gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
            gate = layers.Conv2D(4 * width, 1, activation="hard_sigmoid")(layers.Conv2D(8, 1, activation="relu")(gate))
        else:
            gate = layers.Dense(8, activation="relu")(layers.GlobalAveragePooling2D()(y))
            gate = layers.Reshape((1, 1, 4 * width))(layers.Dense(4 * width, activation="sigmoid")(gate))
        y = layers.BatchNormalization()(layers.Conv2D(width, 1)(layers.Multiply()([y, gate])))
        x = layers.Add()([x, y]) if x.shape[-1] == width else y
    return keras.Model(image, layers.Dense(5)(layers.Flatten()(layers.AveragePooling2D(4)(x))))


def _separable() -> keras.Model:
    x = image = keras.Input((40, 40, 1))
    for width in (16, 24, 32):
        x = layers.SeparableConv2D(width, 3, padding="same")(x)
        x = layers.PReLU(shared_axes=[1, 2])(layers.BatchNormalization()(x))
        x = layers.SpatialDropout2D(0.2)(layers.MaxPooling2D(2, padding="same")(x))
    return keras.Model(image, layers.Dense(6, activation="softmax")(layers.Dense(32)(layers.Flatten()(x))))


def _shuffled() -> keras.Model:
    """Grouped convolutions and a channel shuffle by Reshape and Permute."""
    x = image = keras.Input((24, 24, 3))
    x = _conv(x, 24)
    for _ in range(2):
        y = _conv(x, 24, 1, groups=3)
        y = layers.Permute((1, 2, 4, 3))(layers.Reshape((24, 24, 3, 8))(y))
        y = layers.DepthwiseConv2D(3, padding="same")(layers.Reshape((24, 24, 24))(y))
        x = layers.Add()([x, layers.Conv2D(24, 1, groups=3)(y)])
    return keras.Model(image, layers.Dense(4)(layers.GlobalMaxPooling2D()(x)))


def _resized() -> keras.Model:
    """A feature pyramid with bilinear and nearest resizing, dilation, and two outputs."""
    x = image = keras.Input((64, 64, 3))
    a = _conv(x, 16, 3, 2)
    b = _conv(a, 24, 3, 2)
    c = _conv(_conv(b, 32, 3, 2), 32, dilation_rate=2)
    side = layers.UpSampling2D(2, interpolation="bilinear")(_conv(c, 24, 1))
    b = layers.Add()([_conv(b, 24, 1), side])
    a = layers.Concatenate()([a, layers.UpSampling2D(2)(b)])
    padded = layers.ZeroPadding2D(((0, 1), (1, 0)))(a)
    box = layers.Reshape((-1, 4))(layers.Conv2D(8, 3, padding="valid")(padded))
    return keras.Model(image, [box, layers.Conv2D(3, 1, activation="sigmoid")(layers.Cropping2D(2)(b))])


def _sound() -> keras.Model:
    x = wave = keras.Input((128, 20))
    for width, dilation in ((32, 1), (32, 2), (32, 4)):
        y = layers.Conv1D(width, 3, padding="causal", dilation_rate=dilation)(x)
        y = layers.LeakyReLU()(layers.BatchNormalization()(y))
        x = layers.Add()([y, x]) if x.shape[-1] == width else y
    x = layers.Concatenate()([layers.GlobalAveragePooling1D()(x), layers.GlobalMaxPooling1D()(x)])
    return keras.Model(wave, layers.Dense(7)(layers.Dropout(0.1)(layers.Dense(24, activation="elu")(x))))


def _volume() -> keras.Model:
    x = image = keras.Input((8, 16, 16, 1))
    x = layers.BatchNormalization()(layers.Conv3D(8, 3, padding="same", activation="relu")(x))
    x = layers.Conv3D(12, 3, 2, padding="same", activation="relu")(x)
    return keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling3D()(x)))


def _recurrent(cell: str) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        make_cell = getattr(layers, cell)
        x = text = keras.Input((12, 10))
        x = layers.Bidirectional(make_cell(16, return_sequences=True))(x)
        x = make_cell(14, return_sequences=True)(x)
        x = layers.TimeDistributed(layers.Dense(12, activation="relu"))(x)
        return keras.Model(text, layers.Dense(4)(make_cell(9)(x)))

    return make


def _text() -> keras.Model:
    words = keras.Input((20,), dtype="int32")
    x = layers.Embedding(50, 24)(words)
    found = [layers.GlobalMaxPooling1D()(layers.Conv1D(16, k, activation="relu")(x)) for k in (2, 3, 4)]
    return keras.Model(words, layers.Dense(2, activation="softmax")(layers.Concatenate()(found)))


def _gelu(x: Tensor) -> Tensor:
    """By tanh: for the error function an operator is written that ONNX does not have."""
    return keras.activations.gelu(x, approximate=True)


def _transformer() -> keras.Model:
    x = tokens = keras.Input((16, 24))
    for _ in range(2):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, 6)(y, y)])
        y = layers.Dense(48, activation=_gelu)(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(24)(y)])
    return keras.Model(tokens, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def _group_norm() -> keras.Model:
    x = image = keras.Input((16, 16, 3))
    for width in (16, 24):
        x = layers.Conv2D(width, 3, padding="same")(x)
        x = layers.Activation("silu")(layers.GroupNormalization(4)(x))
    x = layers.Add()([x, layers.UnitNormalization()(x)])
    return keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def _siamese() -> keras.Model:
    """One body, with its weights, on two inputs."""
    inner = image = keras.Input((16, 16, 3))
    inner = layers.GlobalAveragePooling2D()(_conv(_conv(inner, 12), 20, 3, 2))
    body = keras.Model(image, inner)
    left, right = keras.Input((16, 16, 3)), keras.Input((16, 16, 3))
    a, b = body(left), body(right)
    far = layers.Subtract()([a, b])
    joined = layers.Concatenate()([layers.Dot(1)([a, b]), layers.Multiply()([far, far]), layers.Maximum()([a, b])])
    return keras.Model([left, right], layers.Dense(1, activation="sigmoid")(layers.Dense(8, activation="tanh")(joined)))


def _convlstm() -> keras.Model:
    x = film = keras.Input((4, 12, 12, 2))
    x = layers.ConvLSTM2D(8, 3, padding="same", return_sequences=True)(x)
    x = layers.BatchNormalization()(x)
    return keras.Model(film, layers.Conv3D(1, 3, padding="same")(x))


def _detector() -> tf.types.experimental.GenericFunction:
    """A raw TensorFlow function: preprocessing in front, box decoding and non-maximum suppression behind."""
    x = image = keras.Input((64, 64, 3))
    x = _conv(_conv(_conv(x, 16, 3, 2), 24, 3, 2), 32, 3, 2)
    body = keras.Model(image, [layers.Conv2D(8, 1)(x), layers.Conv2D(6, 1)(x)])
    randomise(body)

    @tf.function(input_signature=[tf.TensorSpec((1, None, None, 3), tf.uint8, name="image")])
    def detect(image: tf.Tensor) -> tuple[tf.Tensor, ...]:
        x = (tf.image.resize(tf.cast(image, tf.float32), (64, 64)) - 127.5) / 127.5
        boxes, scores = body(x, training=False)
        boxes, scores = tf.reshape(boxes, (-1, 4)), tf.reshape(tf.sigmoid(scores), (-1, 3))
        best = tf.reduce_max(scores, -1)
        chosen = tf.image.non_max_suppression(tf.exp(boxes), best, 10, 0.5, 0.1)
        return tf.gather(boxes, chosen), tf.gather(best, chosen), tf.argmax(tf.gather(scores, chosen), -1)

    return detect


def _looped() -> tf.types.experimental.GenericFunction:
    """A while loop and a condition around layers."""
    body = keras.Sequential([keras.Input((8,)), layers.Dense(16, activation="relu"), layers.Dense(8)])
    before = keras.Sequential([keras.Input((8,)), layers.Dense(24, activation="relu"), layers.Dense(8)])

    @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32, name="x")])
    def run(x: tf.Tensor) -> tf.Tensor:
        x = before(x)
        x = tf.cond(tf.reduce_sum(x) > 0.0, lambda: body(x), lambda: x * 2.0)
        _, x = tf.while_loop(lambda k, x: k < 3, lambda k, x: (k + 1, x + body(x)), (0, x))
        return before(x)

    return run


def _application(name: str, size: int, **options: object) -> Callable[[], keras.Model]:
    return lambda: getattr(keras.applications, name)(weights=None, input_shape=(size, size, 3), classes=10, **options)


MODELS: dict[str, Callable[[], object]] = {
    "residual": _residual,
    "unet": _unet,
    "excited": _excited,
    "separable": _separable,
    "shuffled": _shuffled,
    "resized": _resized,
    "sound": _sound,
    "volume": _volume,
    "lstm": _recurrent("LSTM"),
    "gru": _recurrent("GRU"),
    "rnn": _recurrent("SimpleRNN"),
    "text": _text,
    "transformer": _transformer,
    "group_norm": _group_norm,
    "siamese": _siamese,
    "convlstm": _convlstm,
    "detector": _detector,
    "looped": _looped,
    "MobileNet": _application("MobileNet", 96, alpha=0.25),
    "MobileNetV2": _application("MobileNetV2", 96, alpha=0.35),
    "MobileNetV3Small": _application("MobileNetV3Small", 96),
    "EfficientNetB0": _application("EfficientNetB0", 64),
    "EfficientNetV2B0": _application("EfficientNetV2B0", 64),
    "NASNetMobile": _application("NASNetMobile", 64),
    "DenseNet121": _application("DenseNet121", 64),
    "ResNet50V2": _application("ResNet50V2", 64),
    "ConvNeXtTiny": _application("ConvNeXtTiny", 64),
    "Xception": _application("Xception", 96),
    "InceptionV3": _application("InceptionV3", 96),
}

VARIANTS = ("tf2onnx-9", "tf2onnx-13", "tf2onnx-18", "tf2onnx-nchw", "keras", "tflite", "tflite-int8")


def randomise(model: keras.Model) -> None:
    """Give normalisations values of their own, as training does."""
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization | layers.LayerNormalization | layers.GroupNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(w.dtype) for w in layer.get_weights()])
        elif isinstance(layer, layers.PReLU):
            layer.set_weights([rng.uniform(0.05, 0.4, w.shape).astype(w.dtype) for w in layer.get_weights()])


def _tflite(model: object, spec: list[tf.TensorSpec], quantised: bool) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([_function(model, spec).get_concrete_function()])
    if quantised:
        rng = np.random.default_rng(0)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: (
            [
                rng.standard_normal([d or 32 for d in s.shape]).astype(np.float32)
                if s.dtype.is_floating
                else rng.integers(0, 50, s.shape).astype(s.dtype.as_numpy_dtype)
                for s in spec
            ]
            for _ in range(8)
        )
    return converter.convert()


def _function(model: object, spec: list[tf.TensorSpec]) -> object:
    if not isinstance(model, keras.Model):
        return model
    return tf.function(lambda *x: model(x if len(x) > 1 else x[0], training=False), input_signature=spec)


def export(name: str, variant: str, path: Path) -> None:
    """Write one model."""
    keras.utils.set_random_seed(0)
    model = MODELS[name]()
    spec: list[tf.TensorSpec] = []
    if isinstance(model, keras.Model):
        randomise(model)
        batch = 1 if variant.startswith("tflite") else None
        shapes = [(batch, *x.shape[1:]) for x in model.inputs]
        if variant.startswith("tflite"):
            shapes = [tuple(32 if d is None else d for d in shape) for shape in shapes]
        spec = [
            tf.TensorSpec(s, x.dtype, name=f"input{k}")
            for k, (s, x) in enumerate(zip(shapes, model.inputs, strict=True))
        ]
    if variant.startswith("tflite"):
        part = path.with_suffix(".tflite")
        part.write_bytes(_tflite(model, spec, variant.endswith("int8")))
        try:
            tf2onnx.convert.from_tflite(str(part), opset=13, output_path=str(path))
        finally:
            part.unlink()
    elif variant == "keras":
        zeros = [keras.ops.zeros([d or 32 for d in x.shape], x.dtype) for x in model.inputs]
        model(zeros if len(zeros) > 1 else zeros[0])  # it asks for a model that was called
        model.export(str(path), format="onnx", verbose=False)
    else:
        options: dict[str, object] = {"opset": 13 if variant.endswith("nchw") else int(variant.rpartition("-")[2])}
        if variant.endswith("nchw"):
            options["inputs_as_nchw"] = [s.name for s in spec if len(s.shape) == 4]
        signature = spec or model.input_signature
        tf2onnx.convert.from_function(
            _function(model, spec), input_signature=signature, output_path=str(path), **options
        )


def _write(name: str, variant: str, path: Path) -> None:
    """Export whole, or leave the exporter's words."""
    part = path.with_suffix(".part.onnx")
    try:
        export(name, variant, part)
        part.rename(path)
    except Exception as error:  # what an exporter refuses is not ours to judge
        part.unlink(missing_ok=True)
        path.with_suffix(".failed").write_text(next(iter(repr(error).splitlines()), "")[:200])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for turn, name in enumerate(MODELS):
        own = name.islower()
        for which, variant in enumerate(VARIANTS):
            # every way of the small ones; two, in turn, of the applications
            if not (own or which in (1, turn % len(VARIANTS))):
                continue
            path = options.folder / f"keras__{name}__{variant}__{'fixed' if 'tflite' in variant else 'dynamic'}.onnx"
            if not is_done(path) and re.search(options.only, path.stem):
                write_apart(path, functools.partial(_write, name, variant, path))


if __name__ == "__main__":
    main()
