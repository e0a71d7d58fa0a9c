"""Folders of images as calibration data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import DYNAMIC, FLAT, FLOATS, GREY, NCHW, NHWC, N, everything, picture, save_images, save_tensors, spec

from onnxprune.data import Preprocessing, load_calibration
from onnxprune.errors import InputError


def test_folder_is_recursive_lazy_and_exact(tmp_path):
    pictures = {f"{k % 2}/{k}.PNG": picture(seed=k) for k in range(4)}
    save_images(tmp_path / "f", pictures | {"x.bmp": picture(seed=9), ".hidden.png": picture((2, 2))})
    (tmp_path / "f" / "notes.txt").write_text("no image")
    data = load_calibration(tmp_path / "f", [NCHW], preprocessing=Preprocessing(scale=1.0))
    assert data.source == "f, 5 images" and data.batchable and not data.warnings
    found = {image.tobytes() for image in everything(data)["x"]}
    expected = [picture(seed=k) for k in (0, 1, 2, 3, 9)]
    assert found == {np.asarray(p).transpose(2, 0, 1).astype(np.float32).tobytes() for p in expected}
    dynamic = load_calibration(tmp_path / "f", [spec(N, 3, N, N)])
    picture((5, 5)).save(tmp_path / "f" / "x.bmp")
    with pytest.raises(InputError, match=r"expected image x.bmp as it was when first read, .* another size"):
        everything(dynamic)
    (tmp_path / "f" / "x.bmp").unlink()
    with pytest.raises(InputError, match=r"expected image x.bmp as it was when first read, found it changed"):
        everything(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize(("model", "channels"), [(NCHW, "RGB"), (GREY, "L")])
def test_folder_modes(tmp_path, mode, model, channels):
    name = "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"
    if mode == "I;16":
        deep = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
        image, expected = Image.fromarray(deep), Image.fromarray((deep >> 8).astype(np.uint8)).convert(channels)
    else:
        image = picture(mode=mode)
        expected = None
    save_images(tmp_path, {name: image})
    with Image.open(tmp_path / name) as saved:
        opaque = saved.convert("RGBA") if mode == "P" else saved  # transparency is dropped
        expected = np.asarray(expected or opaque.convert(channels)).reshape(4, 5, -1)
    found = everything(load_calibration(tmp_path, [model], preprocessing=Preprocessing(scale=1.0)))["x"]
    np.testing.assert_array_equal(found[0], expected.transpose(2, 0, 1))


def test_links_to_folders_are_followed_unless_they_lead_back(tmp_path):
    save_images(
        tmp_path, {"all/cat/a.png": picture(), "all/dog/b.png": picture(seed=1), "some/own.png": picture(seed=2)}
    )
    (tmp_path / "some" / "cat").symlink_to(tmp_path / "all" / "cat")
    (tmp_path / "all" / "cat" / "back").symlink_to(tmp_path / "some")
    (tmp_path / "some" / "here").symlink_to(".")
    data = load_calibration(tmp_path / "some", [NCHW])
    assert data.source == "some, 2 images"


@pytest.mark.parametrize("given", [".", "..", "../f"])
def test_a_folder_is_called_by_its_name_however_it_is_given(tmp_path, monkeypatch, given):
    folder = save_images(tmp_path / "f", {"a.png": picture()})
    (folder / "inner").mkdir()
    whole = load_calibration(folder, [NCHW])
    monkeypatch.chdir(folder / "inner" if given == ".." else folder)
    found = load_calibration(given, [NCHW])
    assert found.source == "f, 1 image" and found.digest == whole.digest
    save_tensors(folder / "test_data_set_0", [FLOATS[:1]])
    assert load_calibration(given, [FLAT]).source == "f, 1 record"
    monkeypatch.chdir(folder)
    assert load_calibration(None, [FLAT], model_path=Path("model.onnx")).source == "f, 1 record"


@pytest.mark.filterwarnings("error")
def test_what_pillow_warns_of_is_not_said(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)  # warned of up to twice as many
    assert len(load_calibration(save_images(tmp_path, {"a.png": picture()}), [NCHW])) == 1


def test_an_empty_path_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(save_images(tmp_path, {"a.png": picture()}))
    with pytest.raises(InputError, match="found an empty path; is a variable not set"):
        load_calibration("", [NCHW])


def test_folder_applies_exif_orientation(tmp_path):
    image = picture((4, 5))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    save_images(tmp_path, {"a.png": image}, exif=exif)
    found = everything(load_calibration(tmp_path, [NHWC], preprocessing=Preprocessing(scale=1.0)))["x"]
    np.testing.assert_array_equal(found[0], np.rot90(np.asarray(image), -1))


def test_folder_fits_itself_to_a_fixed_size(tmp_path):
    save_images(tmp_path, {"wide.png": picture((20, 8)), "tall.png": picture((10, 16)), "same.png": picture()})
    data = load_calibration(tmp_path, [NHWC], preprocessing=Preprocessing(scale=1.0))
    assert everything(data)["x"].shape == (3, 4, 5, 3)
    alone = save_images(tmp_path / "alone", {"wide.png": picture((20, 8))})
    found = everything(load_calibration(alone, [NHWC], preprocessing=Preprocessing(scale=1.0)))["x"][0]
    half = picture((20, 8)).resize((10, 4), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found, np.asarray(half)[:, 2:7])


def test_resize_and_crop(tmp_path):
    save_images(tmp_path, {"a.png": picture((12, 8)), "b.png": picture((8, 20))})
    options = Preprocessing(scale=1.0, resize=6, crop=4)
    data = load_calibration(tmp_path, [spec(N, N, N, 3)], preprocessing=options)
    expected = np.asarray(picture((12, 8)).resize((9, 6), Image.Resampling.BILINEAR))[1:5, 2:6]
    found = everything(data)["x"]
    assert found.shape == (2, 4, 4, 3)
    assert any(np.array_equal(image, expected) for image in found)
    square = load_calibration(tmp_path, [spec(N, 3, 5, 4)], preprocessing=Preprocessing(resize=6))
    assert everything(square)["x"].shape == (2, 3, 5, 4)


def test_unreadable_images_are_skipped_and_replaced(tmp_path):
    save_images(tmp_path, {f"{k}.png": picture(seed=k) for k in range(4)})
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "empty.gif").write_bytes(b"")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    data = load_calibration(tmp_path, [NCHW], samples=3)
    assert len(data) == 3 and everything(data)["x"].shape == (3, 3, 4, 5)
    data = load_calibration(tmp_path, [NCHW])
    text = " ".join(data.warnings)
    assert len(data) == 3 and len(data.warnings) == 3
    assert all(f"unreadable image {name}" in text for name in ("broken.jpg", "empty.gif", "3.png"))
    for k in range(9):
        (tmp_path / f"bad{k}.jpg").write_bytes(b"?")
    assert load_calibration(tmp_path, [NCHW]).warnings[-1] == "7 more unreadable images skipped"


def test_folder_in_fixed_batches(tmp_path):
    save_images(tmp_path, {f"{k}.png": picture(seed=k) for k in range(5)})
    data = load_calibration(tmp_path, [spec(2, 3, 4, 5)])
    assert len(data) == 2 and not data.batchable and data.feeds([1])["x"].shape == (2, 3, 4, 5)
    assert len(load_calibration(tmp_path, [spec(2, 3, 4, 5)], samples=1)) == 1
    with pytest.raises(InputError, match="expected at least 8 readable images, the model's batch size, found 5"):
        load_calibration(tmp_path, [spec(8, 3, 4, 5)])


@pytest.mark.parametrize(
    ("images", "inputs", "options", "text"),
    [
        ({}, [NCHW], {}, "found an empty folder"),
        ({"a.txt": None}, [NCHW], {}, "found other files only"),
        ({"a.png": None}, [NCHW], {}, "expected images, found 1 unreadable, such as a.png"),
        ({"a.png": (5, 4), "b.png": (4, 5)}, [DYNAMIC], {}, r"images of one size .*try --resize and --crop"),
        ({"a.png": (5, 4), "b.png": (4, 4)}, [DYNAMIC], {"resize": 4}, "images of one size"),
        ({"a.png": (5, 4)}, [DYNAMIC], {"crop": 5}, r"a.png: expected .* at least 5x5 .* found 4x5; try --resize 5"),
        ({"a.png": (5, 4)}, [NCHW], {"crop": 4}, r"expected a crop of 4x5 pixels .* found 4; try without --crop"),
        ({"a.png": (50, 40)}, [NCHW], {"resize": 3}, "at least 4x5 pixels .* found 3x3"),
        ({"a.png": (5, 4)}, [spec(N, 3, N, 6)], {}, r"expected an image of at least 4x6"),
        ({"a.png": (5, 4)}, [spec(N, 8, 4, 5)], {}, "expected a model with 1 or 3 channels"),
        ({"a.png": (5, 4)}, [FLAT], {}, "expected a model with a 4-D input"),
        ({"a.png": (5, 4)}, [NCHW, FLAT], {}, "found a folder of images, which feeds one"),
        ({"a.png": (5, 4)}, [NCHW], {"mean": (1.0, 2.0)}, "expected 1 or 3 numbers as mean"),
    ],
)
def test_folder_refusals(tmp_path, images, inputs, options, text):
    for name, size in images.items():
        if size:
            picture(size).save(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(b"?")
    with pytest.raises(InputError, match=text):
        load_calibration(tmp_path, inputs, preprocessing=Preprocessing(**options))
