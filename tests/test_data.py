"""Calibration data: every source gives the model's names, types and layout, or one clear refusal."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from sources import (
    DYNAMIC,
    FLAT,
    FLOATS,
    GREY,
    NCHW,
    NHWC,
    PIXELS,
    RNG,
    N,
    everything,
    picture,
    save_images,
    save_tensors,
    spec,
    unshuffled,
)

from onnxprune.data import InputSpec, Preprocessing, load_calibration
from onnxprune.errors import InputError, InternalError

# ---------------------------------------------------------------------------------- images in arrays


@pytest.mark.parametrize(
    ("given", "model", "expected"),
    [
        (PIXELS, NCHW, PIXELS.transpose(0, 3, 1, 2)),
        (PIXELS.transpose(0, 3, 1, 2), NCHW, PIXELS.transpose(0, 3, 1, 2)),
        (PIXELS, NHWC, PIXELS),
        (PIXELS.transpose(0, 3, 1, 2), NHWC, PIXELS),
        (PIXELS[..., 0], GREY, PIXELS[:, None, :, :, 0]),
        (PIXELS[..., :1], GREY, PIXELS[:, None, :, :, 0]),
        (PIXELS[..., 0], spec(N, 4, 5, 1), PIXELS[..., :1]),
        (PIXELS[..., 0], NCHW, np.repeat(PIXELS[:, None, :, :, 0], 3, axis=1)),
        (PIXELS, spec(N, N, N, N), PIXELS.transpose(0, 3, 1, 2)),
        (PIXELS, spec(N, N, N, 3), PIXELS),
        (PIXELS, spec(N, 3, N, N), PIXELS.transpose(0, 3, 1, 2)),
        (PIXELS[:, :3, :3], spec(N, 3, 3, 3), PIXELS[:, :3, :3]),  # a tie: the model's own layout
        (PIXELS[:, :3], spec(N, 3, 3, 5), PIXELS[:, :3].transpose(0, 3, 1, 2)),  # a tie that the size decides
        (PIXELS[:, None], NCHW, PIXELS.transpose(0, 3, 1, 2)),  # whole feeds of one sample
    ],
)
def test_layouts_of_images(given, model, expected):
    data = load_calibration(given, [model], preprocessing=Preprocessing(scale=1.0))
    assert data.batchable and len(data) == 6 and not data.warnings
    found = unshuffled(data)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("model", [NCHW, NHWC])
def test_preprocessing_is_rounded_once(model, dtype):
    options = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    model = InputSpec("x", model.shape, np.dtype(dtype))
    expected = ((PIXELS * (1 / 255) - np.array(options.mean)) / np.array(options.std)).astype(dtype)
    if model.shape[1] == 3:
        expected = expected.transpose(0, 3, 1, 2)
    found = unshuffled(load_calibration(PIXELS, [model], preprocessing=options))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)


def test_bgr_flips_before_mean_and_std():
    options = Preprocessing(scale=1.0, mean=(104, 117, 123), std=(2,), bgr=True)
    expected = (PIXELS[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)) / 2
    found = unshuffled(load_calibration(PIXELS, [NHWC], preprocessing=options))
    np.testing.assert_array_equal(found, expected)


def test_uint8_model_gets_the_pixels():
    found = unshuffled(load_calibration(PIXELS, [spec(N, 3, 4, 5, dtype="uint8")]))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, PIXELS.transpose(0, 3, 1, 2))
    other = RNG.integers(0, 9, (3, 8, 4, 5), dtype=np.uint8)  # uint8, but no image
    np.testing.assert_array_equal(unshuffled(load_calibration(other, [spec(N, 8, 4, 5, dtype="uint8")])), other)


def test_options_that_have_no_effect_are_told():
    assert "not applied" in load_calibration(FLOATS, [FLAT], preprocessing=Preprocessing(mean=(0.5,))).warnings[0]
    assert "resize and crop" in load_calibration(PIXELS, [NCHW], preprocessing=Preprocessing(crop=4)).warnings[0]
    pixels = spec(N, 3, 4, 5, dtype="uint8")  # taken as they are
    assert (
        "mean and std are not" in load_calibration(PIXELS, [pixels], preprocessing=Preprocessing(std=(2,))).warnings[0]
    )
    assert not load_calibration(PIXELS, [pixels], preprocessing=Preprocessing(bgr=True)).warnings
    assert "not applied" in load_calibration(None, [NCHW], preprocessing=Preprocessing(mean=(0.5,))).warnings[1]


def test_a_folder_says_the_same_of_options_that_have_no_effect(tmp_path):
    folder = save_images(tmp_path, {"a.png": picture()})
    options = Preprocessing(mean=(0.5,))
    assert (
        "mean and std" in load_calibration(folder, [spec(N, 3, 4, 5, dtype="uint8")], preprocessing=options).warnings[0]
    )
    assert not load_calibration(folder, [NCHW], preprocessing=options).warnings


def test_a_number_as_mean_or_std_is_that_of_every_channel():
    options = Preprocessing(mean=0.5, std=np.array([0.25, 0.5, 1]))
    assert (options.mean, options.std) == ((0.5,), (0.25, 0.5, 1.0))
    assert hash(options) == hash(Preprocessing(mean=[0.5], std=[0.25, 0.5, 1]))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": 0.0}, "expected a finite scale other than 0, found 0.0"),
        ({"mean": (float("nan"),)}, "finite numbers as mean"),
        ({"mean": ()}, "finite numbers as mean"),
        ({"std": (1, 0, 1)}, "numbers above 0 as std"),
        ({"crop": 0}, "at least 1 pixel as crop"),
    ],
)
def test_preprocessing_refusals(options, text):
    with pytest.raises(InputError, match=text):
        Preprocessing(**options)


# -------------------------------------------------------------------------------- arrays and their files


def test_npz_by_name_or_only_array(tmp_path):
    labels = np.arange(6)
    for key in ("x", "images", "whatever"):
        np.savez(tmp_path / f"{key}.npz", **{key: PIXELS, "labels": labels})
        data = load_calibration(tmp_path / f"{key}.npz", [NCHW], samples=4)
        assert data.source == f"{key}.npz, key '{key}', 4 of 6 samples"
        assert not data.warnings and not data.is_random
    np.savez(tmp_path / "more.npz", x=PIXELS, extra=labels)
    assert "'extra' ignored" in load_calibration(tmp_path / "more.npz", [NCHW]).warnings[0]


def test_npy_is_mapped_and_cast(tmp_path):
    np.save(tmp_path / "a.npy", FLOATS.astype(np.float64))
    data = load_calibration(str(tmp_path / "a.npy"), [FLAT])
    assert isinstance(data._readers["x"].__self__.values, np.memmap)
    assert data.source == "a.npy, 6 samples"
    np.testing.assert_array_equal(unshuffled(data), FLOATS)
    assert type(data.feeds([0])["x"]) is np.ndarray


def test_several_inputs_with_constants(tmp_path):
    inputs = [spec(1, 16, name="input"), spec(2, 1, 3, name="state"), spec(name="sr", dtype="int64")]
    sound = RNG.standard_normal((5, 16)).astype(np.float32)
    states = RNG.standard_normal((5, 2, 1, 3)).astype(np.float32)
    np.savez(tmp_path / "constant.npz", input=sound, state=states[0], sr=np.int64(16000))
    data = load_calibration(tmp_path / "constant.npz", inputs)
    assert len(data) == 5 and not data.batchable
    for r in range(5):
        feeds = data.feeds([r])
        np.testing.assert_array_equal(feeds["input"], sound[data._order[r]][None])
        np.testing.assert_array_equal(feeds["state"], states[0])
        assert feeds["sr"].shape == () and feeds["sr"] == 16000 and feeds["sr"].dtype == np.int64
    varied = load_calibration({"input": sound, "state": states, "sr": 16000}, inputs)
    np.testing.assert_array_equal(varied.feeds([3])["state"], states[varied._order[3]])
    with pytest.raises(InternalError, match="one record at a time"):
        data.feeds([0, 1])


def test_several_dynamic_inputs_go_together():
    ids = np.arange(12).reshape(6, 2)
    data = load_calibration({"ids": ids, "x": FLOATS}, [FLAT, spec(N, 2, name="ids", dtype="int32")])
    feeds = data.feeds([4, 1])
    assert data.batchable and feeds["ids"].dtype == np.int32 and set(feeds) == {"x", "ids"}
    np.testing.assert_array_equal(feeds["ids"], ids[[data._order[4], data._order[1]]])
    np.testing.assert_array_equal(feeds["x"], FLOATS[[data._order[4], data._order[1]]])


def test_fixed_batches():
    data = load_calibration(PIXELS, [spec(4, 3, 4, 5)], preprocessing=Preprocessing(scale=1.0))
    assert len(data) == 1 and not data.batchable  # two are left over
    np.testing.assert_array_equal(data.feeds([0])["x"], PIXELS[:4].transpose(0, 3, 1, 2))
    data = load_calibration(PIXELS, [spec(2, 3, 4, 5)])
    assert (
        data.source == "array, 3 records of 2 samples" and len(data) == 3 and data.feeds([2])["x"].shape == (2, 3, 4, 5)
    )
    whole = load_calibration(FLOATS.reshape(3, 2, 7), [spec(2, 7)])
    np.testing.assert_array_equal(whole.feeds([1])["x"], FLOATS.reshape(3, 2, 7)[whole._order[1]])
    one = load_calibration(FLOATS, [spec(1, 7)])
    assert len(one) == 6 and not one.batchable and one.feeds([0])["x"].shape == (1, 7)
    assert len(load_calibration(FLOATS[:1], [spec(1, 7)])) == 1


def test_bfloat16_model():
    dtype = pytest.importorskip("ml_dtypes").bfloat16
    found = unshuffled(load_calibration(FLOATS, [InputSpec("x", (N, 7), np.dtype(dtype))]))
    assert found.dtype == dtype


BAD_FLOATS = FLOATS.copy()
BAD_FLOATS[4, 2] = np.nan
INTS = spec(N, 7, dtype="int32")


@pytest.mark.parametrize(
    ("given", "inputs", "text"),
    [
        (BAD_FLOATS, [FLAT], r"sample 4: expected finite numbers for input 'x', found NaN or infinity"),
        (np.full((3, 7), np.inf), [FLAT], "sample 0: expected finite numbers"),
        (np.full((3, 7), 1e300), [FLAT], "within the range of float32"),
        (np.full((3, 7), 1 << 40), [INTS], "within the range of int32"),
        (FLOATS, [INTS], r"expected int32 for input 'x' \[N, 7\], found float32"),
        (FLOATS.astype(int), [FLAT], r"expected float32 .*, found int64; try array.astype\('float32'\)"),
        (FLOATS.astype(np.uint8), [FLAT], "uint8 is taken as images by 4-D inputs only"),
        (FLOATS > 0, [FLAT], "expected float32 .* found bool"),
        (FLOATS.astype(str), [FLAT], "expected float32 .* found <U"),
        (FLOATS[:0], [FLAT], "expected at least 1 sample"),
        (np.float32(1), [FLAT], r"expected shape \[N, 7\] .* found \[\]"),
        (FLOATS, [spec()], "try to state the input's shape in the model"),
        (FLOATS[:, :5], [FLAT], r"expected shape \[N, 7\] for input 'x', found \[6, 5\]"),
        (FLOATS[0], [FLAT], r"found \[7\]; try array\[None\]"),
        (FLOATS, [NCHW], r"expected shape \[N, 3, 4, 5\] for input 'x', found \[6, 7\]"),
        (PIXELS / 255, [NCHW], r"try array.transpose\(0, 3, 1, 2\): the data are NHWC, the model's layout is NCHW"),
        (PIXELS.transpose(0, 3, 1, 2) / 255, [NHWC], r"try array.transpose\(0, 2, 3, 1\): the data are NCHW"),
        (PIXELS, [spec(N, 3, 8, 8)], r"expected images of 8x8 pixels \(height x width\) for input 'x', found 4x5"),
        (PIXELS[0], [NCHW], r"try to give a single image, of shape \[4, 5, 3\], as array\[None\]"),
        (PIXELS, [GREY], r"expected images with 1 channel\(s\) .* found 3 .* convert the images to grey"),
        (np.zeros((2, 4, 5, 4), np.uint8), [NCHW], "found 4 .*drop the alpha channel"),
        (np.zeros((2, 8, 4, 5), np.uint8), [spec(N, 8, 4, 5)], "expected uint8 images as"),
        (PIXELS, [spec(N, 8, 4, 5)], "expected data with 8 channels"),
        (PIXELS, [spec(8, 3, 4, 5)], "expected at least 8 sample.* found 6"),
        (FLOATS, [FLAT, spec(N, 2, name="y")], "expected data for the 2 inputs 'x', 'y', found a single array"),
        (
            {"x": FLOATS, "idz": FLOATS},
            [FLAT, spec(N, 7, name="ids")],
            "found 'x', 'idz'; try to rename 'idz' to 'ids'",
        ),
        ({"a": FLOATS, "b": FLOATS}, [FLAT], "expected arrays named 'x', as the model's inputs, found 'a', 'b'"),
        ({"y": FLOATS}, [FLAT], "expected arrays named 'x'"),
        ({}, [FLAT], "found none"),
        ({"x": FLOATS, "z": FLOATS[:2]}, [FLAT, spec(N, 7, name="z")], "found 6 for 'x', 2 for 'z'"),
        ({"x": [[1.0]]}, [FLAT], "key 'x': expected a NumPy array, found an object of type list"),
        ({"x": FLOATS, "s": FLOATS}, [FLAT, spec(2, 7, name="s")], r"expected shape \[2, 7\] for every record"),
        (3, [FLAT], "expected a path, an array, a mapping .* found int"),
        (b"abc", [FLAT], "found bytes"),
        (object(), [FLAT], "found object"),
        (FLOATS, [], "expected a model with inputs"),
        (FLOATS, [spec(N, dtype="O")], "expected floats, integers or booleans, found object"),
    ],
)
def test_array_refusals(given, inputs, text):
    with pytest.raises(InputError, match=text) as caught:
        load_calibration(given, inputs)
    assert "\n" not in str(caught.value)


def test_only_the_chosen_samples_are_checked():
    data = load_calibration(BAD_FLOATS, [FLAT], samples=2, seed=0)
    assert 4 not in data._order and len(data) == 2


def test_options_of_preprocessing_must_suit_the_channels():
    for option in ("mean", "std"):
        with pytest.raises(InputError, match=f"expected 1 or 3 numbers as {option}, .* found 2"):
            load_calibration(PIXELS, [NCHW], preprocessing=Preprocessing(**{option: (1.0, 2.0)}))
    with pytest.raises(InputError, match="within the range of float16"):
        options = Preprocessing(scale=1e6)
        load_calibration(PIXELS, [spec(N, 3, 4, 5, dtype="float16")], preprocessing=options).feeds([0])


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.npz", b"", "found an empty file"),
        ("a.npy", b"", "found an empty file"),
        ("a.npy", b"what is this", "found other content"),
        ("a.txt", b"1 2 3", "found other content"),
        ("a.npz", b"PK\x03\x04 broken", "found a file that cannot be read"),
        ("a.npy", b"\x93NUMPY\x01", "found a file that cannot be read"),
        ("a.png", b"", "found a single image; try the folder that holds it"),
    ],
)
def test_file_refusals(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=text):
        load_calibration(tmp_path / name, [FLAT])


def test_more_file_refusals(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    np.save(tmp_path / "short.npy", FLOATS)
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-9])
    np.savez(tmp_path / "short.npz", x=FLOATS)
    (tmp_path / "short.npz").write_bytes((tmp_path / "short.npz").read_bytes()[:-40])
    np.savez_compressed(tmp_path / "wrong.npz", x=FLOATS)
    content = bytearray((tmp_path / "wrong.npz").read_bytes())
    content[80:120] = bytes(40)
    (tmp_path / "wrong.npz").write_bytes(content)
    for name in ("pickled.npy", "pickled.npz", "short.npy", "short.npz", "wrong.npz"):
        with pytest.raises(InputError, match=f"{name}: expected arrays of numbers .* cannot be read"):
            load_calibration(tmp_path / name, [FLAT])
    np.save(tmp_path / "none.npy", FLOATS[:0])
    with pytest.raises(InputError):
        load_calibration(tmp_path / "none.npy", [FLAT])
    import zipfile

    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x", "text")
    with pytest.raises(InputError, match="expected an array as 'x', found other content"):
        load_calibration(tmp_path / "other.npz", [FLAT])
    with pytest.raises(InputError, match="found no such file or folder"):
        load_calibration(tmp_path / "nowhere", [FLAT])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 0}, "expected at least 1 sample, found 0"),
        ({"seed": -1}, "expected a seed of 0 or more"),
        ({"preprocessing": {"mean": 0.5}}, "expected an onnxprune.Preprocessing, found dict"),
    ],
)
def test_option_refusals(options, text):
    with pytest.raises(InputError, match=text):
        load_calibration(FLOATS, [FLAT], **options)


# ----------------------------------------------------------------------------------- ONNX test data sets


def test_test_data_sets(tmp_path):
    two = [FLAT, spec(N, 2, name="ids", dtype="int64")]
    for k in range(3):
        arrays = [FLOATS[k : k + 1], np.full((1, 2), k)]
        save_tensors(tmp_path / f"test_data_set_{k}", arrays, names=["", "unknown"])
    data = load_calibration(tmp_path, two)
    assert len(data) == 3 and data.batchable
    feeds = everything(data)
    np.testing.assert_array_equal(feeds["x"], FLOATS[feeds["ids"][:, 0]])
    one = load_calibration(tmp_path / "test_data_set_1", two)
    np.testing.assert_array_equal(one.feeds([0])["x"], FLOATS[1:2])
    swapped = save_tensors(tmp_path / "named", [np.ones((1, 2), np.int64), FLOATS[:1]], names=["ids", "x"])
    np.testing.assert_array_equal(load_calibration(swapped, two).feeds([0])["x"], FLOATS[:1])


@pytest.mark.parametrize(
    ("arrays", "names", "text"),
    [
        ([FLOATS[:1]] * 2, ["", ""], "input_1.pb: expected one tensor for each of the inputs 'x', found one more"),
        ([FLOATS[:1]] * 2, ["x", "x"], "found two for 'x'"),
        ([FLOATS[:1, :3]], ["x"], r"test_data_set_0, input 'x': expected shape \[N, 7\]"),
    ],
)
def test_test_data_refusals(tmp_path, arrays, names, text):
    folder = save_tensors(tmp_path / "test_data_set_0", arrays, names)
    with pytest.raises(InputError, match=text):
        load_calibration(folder, [FLAT])
    (folder / "input_0.pb").write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"input_0.pb: expected an ONNX tensor"):
        load_calibration(folder, [FLAT])


# ------------------------------------------------------------------------------- callables and iterables


def test_iterables_of_arrays_and_dicts():
    as_list = load_calibration([row[None] for row in FLOATS], [FLAT])
    np.testing.assert_array_equal(unshuffled(as_list)[np.argsort(np.random.default_rng(0).permutation(6))], FLOATS)
    for items in ([{"x": row[None], "label": 1} for row in FLOATS], list(FLOATS)):  # without a batch axis, too
        for source in (iter(items), lambda items=items: items, lambda items=items: iter(items)):
            data = load_calibration(source, [FLAT])
            assert data.batchable and len(data) == 6 and not data.warnings
            assert sorted(map(tuple, everything(data)["x"])) == sorted(map(tuple, FLOATS))
    images = load_calibration(iter(PIXELS), [NCHW], preprocessing=Preprocessing(scale=1.0))
    np.testing.assert_array_equal(unshuffled(images), PIXELS.transpose(0, 3, 1, 2))


def test_endless_generator_is_consumed_as_far_as_needed():
    drawn = []

    def endless():
        buffer = np.empty((1, 7), np.float32)  # reused, as loaders do
        for k in itertools.count():
            drawn.append(k)
            buffer[:] = k
            yield buffer

    data = load_calibration(endless, [FLAT], samples=5)
    assert drawn == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(unshuffled(data)[:, 0], range(5))


def test_items_of_several_shapes_are_run_one_by_one():
    data = load_calibration([np.zeros((1, n), np.float32) for n in (3, 4)], [spec(N, N)])
    assert not data.batchable and {data.feeds([r])["x"].shape for r in (0, 1)} == {(1, 3), (1, 4)}


def test_batches_of_an_iterable_are_as_many_samples():
    """As the rows of an array are, and as loaders of training code give them."""
    data = load_calibration(iter([FLOATS, FLOATS[:2]]), [FLAT])
    assert data.batchable and len(data) == 8 and not data.warnings
    np.testing.assert_array_equal(unshuffled(data), np.concatenate([FLOATS, FLOATS[:2]]))
    assert len(load_calibration(itertools.repeat(FLOATS), [FLAT], samples=8)) == 8
    pair = [FLAT, spec(N, 2, name="y")]
    data = load_calibration([{"x": FLOATS, "y": FLOATS[:, :2]}], pair)
    assert len(data) == 6 and data.feeds([0])["x"][0, 0] == data.feeds([0])["y"][0, 0]
    # of nodes of a graph and their adjacency, the first axis counts no samples
    nodes = InputSpec("x", (N, N), np.dtype("float32"), stacks=False)
    assert len(load_calibration([np.eye(6, dtype=np.float32)], [nodes])) == 1


def test_items_make_fixed_batches():
    data = load_calibration(iter(FLOATS), [spec(4, 7), spec(name="s")][:1])
    assert len(data) == 1
    np.testing.assert_array_equal(data.feeds([0])["x"], FLOATS[:4])
    assert len(load_calibration([FLOATS[:4], FLOATS[2:]], [spec(4, 7)])) == 2
    with pytest.raises(InputError, match=r"found 6 sample\(s\) for a batch of 8"):
        load_calibration(iter(FLOATS), [spec(8, 7)])
    with pytest.raises(InputError, match=r"expected shape \[8, 7\] .* found \[6, 7\]"):
        load_calibration([FLOATS], [spec(8, 7)])
    with pytest.raises(InputError, match=r"expected batches of 8 images .* found 6"):
        load_calibration([PIXELS], [spec(8, 3, 4, 5)])


def test_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "calib_source.py").write_text(
        "import numpy as np\n"
        "class C:\n    @staticmethod\n    def f():\n        yield {'x': np.ones((1, 7))}\n"
        "def nothing():\n    yield from ()\n"
        "def none():\n    pass\n"
        "def path():\n    return 'images'\n"
        "def fails():\n    yield np.ones((1, 7))\n    raise KeyError('oops')\n"
        "def needs(x):\n    pass\n"
        "def labelled():\n    yield np.ones((1, 7)), 3\n"
        "def ends():\n    yield np.ones((1, 7))\n    raise SystemExit\n"
        "number = 3\n"
    )
    (tmp_path / "calib_broken.py").write_text("1 / 0\n")
    (tmp_path / "calib_script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    data = load_calibration("calib_source:C.f", [FLAT])
    assert data.source == "calib_source:C.f, 1 record"
    np.testing.assert_array_equal(data.feeds([0])["x"], np.ones((1, 7), np.float32))
    for source, text in [
        ("calib_source:missing", "found AttributeError"),
        ("calib_nowhere:f", "found ModuleNotFoundError: No module named 'calib_nowhere'"),
        ("calib_broken:f", "found ZeroDivisionError"),
        ("calib_script:f", "found SystemExit: 0"),
        ("calib_source:ends", "found SystemExit"),
        ("calib_source:number", "expected a callable, found int"),
        ("calib_source:nothing", "expected at least one record, found none"),
        ("calib_source:none", "found NoneType"),
        ("calib_source:path", "expected an array, .* found str"),
        ("calib_source:fails", r"found KeyError\('oops'\)"),
        ("calib_source:needs", "found TypeError.*missing 1 required positional argument"),
        ("calib_source:labelled", "record 0: expected an array, .* found tuple; try to yield .* without"),
    ]:
        with pytest.raises(InputError, match=text):
            load_calibration(source, [FLAT])


@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([], "expected at least one record"),
        ([1, 2], "record .: expected an array, .* found int"),
        ([FLOATS[:0]], r"record 0, input 'x': .* found an empty array of shape \[0, 7\]"),
        ([{"z": FLOATS, "w": FLOATS}], "record 0: expected arrays named 'x'"),
        ([BAD_FLOATS], "record 0, input 'x': expected finite numbers"),
        ([FLOATS.astype(int)], "record 0, input 'x': expected float32"),
    ],
)
def test_item_refusals(items, text):
    for source in (items, iter(items)):
        with pytest.raises(InputError, match=text):
            load_calibration(source, [FLAT])


def test_records_of_several_inputs_are_dicts():
    with pytest.raises(InputError, match="found tuple; try to yield dicts"):
        load_calibration([(FLOATS, FLOATS)], [FLAT, spec(N, 7, name="z")])


# ------------------------------------------------------------------------------- beside the model; random


def test_neighbours_of_the_model(tmp_path):
    model = tmp_path / "digits.onnx"
    assert load_calibration(None, [FLAT], model_path=model).is_random
    save_tensors(tmp_path / "test_data_set_0", [FLOATS[:1]])
    assert not load_calibration(None, [FLAT], model_path=model).is_random
    other = load_calibration(None, [spec(N, 9)], model_path=model)
    assert other.is_random and "test data beside the model are not used" in other.warnings[0]
    save_tensors(tmp_path / "digits" / "test_data_set_0", [FLOATS[:1]])
    assert load_calibration(None, [FLAT], model_path=model).source == "digits, 1 record"
    np.savez(tmp_path / "digits.calib.npz", x=FLOATS)
    assert load_calibration(None, [FLAT], model_path=model).source == "digits.calib.npz, key 'x', 6 samples"
    with pytest.raises(InputError, match=r"digits.calib.npz, key 'x': expected shape \[N, 9\]"):
        load_calibration(None, [spec(N, 9)], model_path=model)


def test_random_data():
    inputs = [DYNAMIC, spec(N, N, 3, name="s", dtype="float16"), spec(N, 4, name="i", dtype="int64")]
    data = load_calibration(None, [*inputs, spec(N, name="b", dtype="bool")], samples=3)
    assert data.is_random and data.batchable and len(data) == 3 and "random numbers" in data.warnings[0]
    feeds = data.feeds([0, 1, 2])
    assert {name: (a.shape, a.dtype.name) for name, a in feeds.items()} == {
        "x": ((3, 3, 224, 224), "float32"),
        "s": ((3, 16, 3), "float16"),
        "i": ((3, 4), "int64"),
        "b": ((3,), "bool"),
    }
    assert abs(feeds["x"].mean()) < 0.01 and abs(feeds["x"].std() - 1) < 0.01
    assert set(feeds["i"].ravel()) == {0, 1} and feeds["b"].all()
    assert not np.array_equal(feeds["x"][0], feeds["x"][1])
    assert len(load_calibration(None, [FLAT])) == 64
    assert load_calibration(None, [spec(name="scalar")]).feeds([0])["scalar"].shape == ()


def test_random_shapes_may_be_given():
    data = load_calibration(None, [spec(N, 3, N, N)], dynamic={"x": [2, 3, 8, 6]})
    assert data.feeds([0])["x"].shape == (2, 3, 8, 6) and not data.batchable
    for dynamic, text in [({"z": [1]}, "expected the inputs 'x', found 'z'"), ({"x": [1, 4, 8, 8]}, "found .1, 4, 8")]:
        with pytest.raises(InputError, match=text):
            load_calibration(None, [DYNAMIC], dynamic=dynamic)


# ------------------------------------------------------------------------- order, digest, halves; every source


@pytest.fixture(params=["array", "npy", "npz", "folder", "iterable", "random"])
def source(request, tmp_path):
    if request.param == "folder":
        return save_images(tmp_path / "f", {f"{k}.png": picture(seed=k) for k in range(8)})
    pixels = RNG.integers(0, 256, (8, 4, 5, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", images=pixels)
    return {"npy": tmp_path / "a.npy", "npz": tmp_path / "a.npz", "iterable": list(pixels), "random": None}.get(
        request.param, pixels
    )


def test_the_seed_decides(source):
    first, again, other = (load_calibration(source, [NCHW], samples=6, seed=seed) for seed in (1, 1, 2))
    assert len(first) == 6 and first.digest == again.digest and len(first.digest) == 64
    np.testing.assert_array_equal(everything(first)["x"], everything(again)["x"])
    assert not np.array_equal(everything(first)["x"], everything(other)["x"])


def test_split_keeps_the_last_for_later(source):
    whole = load_calibration(source, [NCHW], samples=6)
    fit, held_out = whole.split(2)
    assert (len(fit), len(held_out)) == (4, 2)
    np.testing.assert_array_equal(
        np.concatenate([everything(fit)["x"], everything(held_out)["x"]]), everything(whole)["x"]
    )
    assert fit.digest == whole.digest and len(whole.split(0)[1]) == 0
    for count in (6, -1):
        with pytest.raises(InputError, match="records to hold out, found 6"):
            whole.split(count)


def test_digest_follows_the_content(tmp_path):
    for k, change in enumerate((0, 0, 1)):
        (tmp_path / str(k)).mkdir()
        np.save(tmp_path / str(k) / "a.npy", FLOATS + np.float32(change))
    digests = [load_calibration(tmp_path / str(k) / "a.npy", [FLAT], seed=k).digest for k in range(3)]
    assert digests[0] == digests[1] != digests[2]  # of what is used, whatever the order
    assert len({load_calibration(list(FLOATS), [FLAT], seed=seed).digest for seed in range(3)}) == 1


def test_no_runtime_is_imported():
    import subprocess
    import sys

    code = "import onnxprune.data, sys; sys.exit(bool({'onnxruntime', 'onnx', 'PIL'} & set(sys.modules)))"
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
