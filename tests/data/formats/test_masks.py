from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from acamkd import config, data
from acamkd.data import MaskFolder
from acamkd.errors import AcamkdError, ImageError

SHARED = Path(__file__).parents[4] / "shared" / "data"
IDS = np.array([[0, 1, 2], [11, 1, 0]], np.uint8)


def _folders(root: Path, names: tuple[str, ...] = ("a.JPG", "b.jpeg", "c.png", "d.bmp", "e.webp")) -> tuple[Path, Path]:
    images, masks = root / "images", root / "masks"
    images.mkdir()
    masks.mkdir()
    for name in names:
        Image.new("RGB", (3, 2)).save(images / name)
        Image.fromarray(IDS).save((masks / name).with_suffix(".png"))
    return images, masks


def _dataset(root: Path, **options: Any) -> MaskFolder:
    return MaskFolder(root / "images", root / "masks", ("sky", "road", "car"), **{"ignore_index": 11, **options})


def test_pairs_by_stem_and_maps_ignore_index_to_void(tmp_path: Path) -> None:
    images, _ = _folders(tmp_path)
    (images / "._a.jpg").write_text("left by a Mac")
    (images / "notes.txt").write_text("not an image")
    dataset = _dataset(tmp_path)
    assert [file.name for file in dataset.files] == ["a.JPG", "b.jpeg", "c.png", "d.bmp", "e.webp"]
    assert data.check(dataset, "full") == []
    for image, target in dataset:
        assert image.shape == (3, 2, 3)
        assert target["mask"].dtype == torch.int64
        assert target["mask"].tolist() == [[0, 1, 2], [255, 1, 0]]


def test_palette_masks_are_ids(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path, ("a.png",))
    palette = Image.fromarray(IDS).convert("P")
    palette.putdata(IDS.ravel().tolist())
    palette.putpalette([200, 10, 10] * 256)
    palette.save(masks / "a.png")
    dataset = _dataset(tmp_path)
    assert data.check(dataset, "full") == []
    assert dataset[0][1]["mask"].tolist() == [[0, 1, 2], [255, 1, 0]]


def test_black_and_white_masks_are_ids(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path, ("a.png",))
    Image.fromarray(np.array([[0, 255, 0], [255, 0, 0]], np.uint8)).convert("1").save(masks / "a.png")
    assert _dataset(tmp_path)[0][1]["mask"].tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(("depth", "row"), [(2, b"\x1b"), (4, b"\x01\x23")])
def test_gray_masks_of_few_bits_are_ids(tmp_path: Path, depth: int, row: bytes) -> None:
    """The values 0, 1, 2 and 3, as Pillow cannot write them; it reads 3 of 2 bits as 255."""
    _, masks = _folders(tmp_path, ("a.png",))
    header = struct.pack(">IIBBBBB", 4, 1, depth, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    (masks / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    dataset = MaskFolder(tmp_path / "images", masks, ("a", "b", "c", "d"))
    assert dataset.target(0, (1, 4))["mask"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("mode", ["full", "headers"])
def test_color_masks_are_refused(tmp_path: Path, mode: Any) -> None:
    _, masks = _folders(tmp_path)
    Image.new("RGB", (3, 2)).save(masks / "b.png")
    with pytest.raises(
        AcamkdError, match=r"1 problem:\n.*b\.png: .* mode RGB; save class ids, as 8-bit gray or with a"
    ):
        data.check(_dataset(tmp_path), mode)


def test_16_bit_masks_are_refused(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path, ("a.png",))
    Image.fromarray(np.full((2, 3), 1, np.uint16)).save(masks / "a.png")
    with pytest.raises(AcamkdError, match=r"a\.png: .* mode I;16; save class ids, as 8-bit gray .* or 16 bits"):
        data.check(_dataset(tmp_path), "full")


@pytest.mark.parametrize("mode", ["full", "headers"])
def test_mask_of_another_size(tmp_path: Path, mode: Any) -> None:
    _, masks = _folders(tmp_path)
    Image.fromarray(IDS.T.copy()).save(masks / "b.png")
    with pytest.raises(AcamkdError, match=r"b\.png: the mask has 2 x 3 pixels, but b\.jpeg has 3 x 2 pixels"):
        data.check(_dataset(tmp_path), mode)


def test_unknown_ids(tmp_path: Path) -> None:
    _folders(tmp_path, ("a.png",))
    dataset = _dataset(tmp_path, ignore_index=255)
    assert data.check(dataset, "headers") == []
    message = r"a\.png: the mask holds 11, but the values for the 3 classes and for void are 0 to 2 and 255"
    with pytest.raises(AcamkdError, match=message):
        data.check(dataset, "full")
    with pytest.raises(ImageError, match=message):  # which a look at the headers did not see
        dataset[0]


def test_a_void_among_the_ids_is_explained(tmp_path: Path) -> None:
    _folders(tmp_path, ("a.png",))
    message = r"the mask holds 11, but the values .* are 0 to 2 \(data.ignore_index .* is listed in data.classes too\)"
    with pytest.raises(AcamkdError, match=message):
        data.check(_dataset(tmp_path, ignore_index=0), "full")


def test_broken_mask(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path)
    (masks / "b.png").write_bytes((masks / "b.png").read_bytes()[:45])
    with pytest.raises(AcamkdError, match=r"1 problem:\n.*b\.png: the mask cannot be read"):
        data.check(_dataset(tmp_path), "full")
    with pytest.raises(ImageError, match=r"b\.png: the mask cannot be read"):  # damaged after the check
        _dataset(tmp_path)[1]


def test_image_without_mask_and_mask_without_image(tmp_path: Path) -> None:
    images, masks = _folders(tmp_path)
    (masks / "a.png").unlink()
    (images / "d.bmp").unlink()
    message = r"2 problems:\n.*a\.JPG: the image has no mask .*a\.png\n.*d\.png: the mask has no image in "
    with pytest.raises(AcamkdError, match=message):
        data.check(_dataset(tmp_path), "full")


def test_masks_of_other_names_are_one_problem(tmp_path: Path) -> None:
    _, masks = _folders(tmp_path)
    for mask in list(masks.iterdir()):
        mask.rename(mask.with_stem(f"{mask.stem}_mask"))
    with pytest.raises(
        AcamkdError, match=r"1 problem:\n.*no mask has the name of an image \(a and a_mask, for example"
    ):
        data.check(_dataset(tmp_path), "full")


def test_one_folder_for_both(tmp_path: Path) -> None:
    images, _ = _folders(tmp_path)
    with pytest.raises(AcamkdError, match=r"images: images and masks are in one folder"):
        MaskFolder(images, images, ("sky", "road", "car"))


def test_two_images_of_one_name(tmp_path: Path) -> None:
    _folders(tmp_path, ("a.png", "a.jpg"))
    with pytest.raises(AcamkdError, match=r"a\.png: the image has the same name as a\.jpg"):
        data.check(_dataset(tmp_path), "full")


def test_no_images(tmp_path: Path) -> None:
    _folders(tmp_path, ())
    with pytest.raises(AcamkdError, match=r"images: the folder holds no images \(\.jpg, "):
        data.check(_dataset(tmp_path), "full")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(AcamkdError, match=r"cannot read the folder .*images: No such file"):
        _dataset(tmp_path)


def test_a_split_whose_folder_is_missing_is_told_how_to_name_it(tmp_path: Path) -> None:
    options = config.Data(format="masks", root=tmp_path, classes=("sky", "road"))
    message = rf"^cannot read the folder {tmp_path}/images/train: data\.train and data\.val name a split's folders with"
    with pytest.raises(AcamkdError, match=message):
        data.build(options, "segmentation", "train", seed=0, augment=False)


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="the CamVid images are not beside the checkout")
def test_real_road_scenes() -> None:
    root = SHARED / "camvid"
    names = [f"class {number}" for number in range(11)]
    dataset = MaskFolder(root / "images" / "val", root / "masks" / "val", names, ignore_index=11)
    assert data.check(dataset, "full") == []
    assert len(dataset) == 101
    image, target = dataset[0]
    assert image.shape == (3, 360, 480)
    assert set(target["mask"].flatten().tolist()) <= {*range(11), 255}


def _two(root: Path, values: list[Any], classes: tuple[str, ...], **options: Any) -> MaskFolder:
    """One image per mask, of 3 x 2 pixels; a mask is an array of values, or an image."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(exist_ok=True)
    for number, mask in enumerate(values):
        Image.new("RGB", (3, 2), (number, 0, 0)).save(root / f"images/{number}.png")
        mask = mask if isinstance(mask, Image.Image) else Image.fromarray(np.array(mask, np.uint8))
        mask.save(root / f"masks/{number}.png")
    options = {"classes": classes, **options}
    split = config.Split(images=Path("images"), masks=Path("masks"))
    recipe = config.Data(format="masks", root=root, train=split, val=split, **options)
    dataset = data.build(recipe, "segmentation", "train", seed=0, augment=False)
    assert isinstance(dataset, MaskFolder)
    return dataset


def _absent(dataset: MaskFolder) -> list[str]:
    data.check(dataset, "full")
    return [text for text in data.compare_splits(dataset, dataset, config.Data()) if "images too" not in text]


BLACK_AND_WHITE = [[0, 255, 0], [255, 255, 0]]


def test_foreground_of_255_is_no_class_unless_the_recipe_says_so(tmp_path: Path) -> None:
    (warning,) = _absent(_two(tmp_path, [BLACK_AND_WHITE] * 2, ("background", "crack")))
    assert warning.startswith(
        "no training image has a pixel of the class crack: the networks cannot learn it; the other"
    )
    assert warning.endswith("say so with data.mask_values: {0: background, 255: crack}")
    for values in ({0: "background", 255: "crack"}, {"0": 0, "255": 1}, {"#000000": "background", "255,255,255": 1}):
        dataset = _two(tmp_path, [BLACK_AND_WHITE] * 2, ("background", "crack"), mask_values=values)
        assert dataset[0][1]["mask"].tolist() == [[0, 1, 0], [1, 1, 0]]
        assert _absent(dataset) == []
        assert dataset.counts is not None
        assert dataset.counts.tolist() == [6, 6, 0]


def test_values_from_1(tmp_path: Path) -> None:
    ones = [[1, 2, 1], [2, 2, 1]]
    (warning,) = _absent(_two(tmp_path, [ones], ("sky", "road", "car")))
    assert warning.startswith("no training image has a pixel of the class sky")
    assert "if the masks' values begin with 1, say what they mean with data.mask_values" in warning
    with pytest.raises(AcamkdError, match=r"the mask holds 2, but the values .* are 0 to 1 and 255 .*begin with 1\?\)"):
        data.check(_two(tmp_path, [ones], ("sky", "road")), "full")
    dataset = _two(tmp_path, [ones], ("sky", "road"), mask_values={1: "sky", 2: "road"})
    assert dataset[0][1]["mask"].tolist() == [[0, 1, 0], [1, 1, 0]]


def test_colors(tmp_path: Path) -> None:
    colors = np.zeros((2, 3, 3), np.uint8)
    colors[0], colors[1, :2] = (128, 64, 128), (70, 130, 180)
    values = {"#804080": "road", "[70, 130, 180]": "sky", "0, 0, 0": "void"}
    images = [Image.fromarray(colors), Image.fromarray(colors).convert("RGBA"), Image.fromarray(colors).quantize(8)]
    dataset = _two(tmp_path, images, ("sky", "road"), mask_values=values)
    assert _absent(dataset) == []
    for _, target in dataset:
        assert target["mask"].tolist() == [[1, 1, 1], [0, 0, 255]]
    colors[0, 0] = (128, 64, 127)
    dataset = _two(tmp_path, [Image.fromarray(colors)], ("sky", "road"), mask_values=values)
    message = "0.png: the mask holds #80407f, but the values for the 2 classes and for void are #000000, #4682b4, #"
    with pytest.raises(AcamkdError, match=message):
        data.check(dataset, "full")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({0: "sky", 1: "raod"}, r"data\.mask_values: 1 is 'raod', which is no class; did you mean road"),
        ({0: "sky"}, r"data\.mask_values names no value for road"),
        ({0: "sky", 1: 2}, r"1 is 2, which is no class"),
    ],
)
def test_what_mask_values_cannot_say(tmp_path: Path, values: dict[Any, Any], message: str) -> None:
    with pytest.raises(AcamkdError, match=message):
        _two(tmp_path, [[[0, 0, 1]] * 2], ("sky", "road"), mask_values=values)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"red": "sky"}, "red is no value of a mask"), ({"0": "sky", "#ff0000": "road"}, "values or colors, not both"),
     ({"256": "sky"}, r"data\.mask_values: 256 is no value"), ({"0": "sky", "00": "road"}, "0, 00 has one value twice"),
     ({"0": False}, "mask_values")],
)  # fmt: skip
def test_what_is_no_value(values: dict[str, Any], message: str) -> None:
    raw = {"name": "x", "task": "segmentation", "student": {"arch": "none"}, "train": {"epochs": 1}}
    with pytest.raises(AcamkdError, match=message):
        config.parse({**raw, "data": {"mask_values": values}})


def test_formats_that_say_themselves_what_values_mean(tmp_path: Path) -> None:
    for name in ("leftImg8bit", "gtFine"):
        (tmp_path / name).mkdir()
    for key, value in {"mask_values": {"0": "road"}, "ignore_index": 0}.items():
        options = config.Data(root=tmp_path).model_copy(update={key: value})
        with pytest.raises(AcamkdError, match=rf"data\.{key}: data\.format cityscapes does not read it for segm"):
            data.build(options, "segmentation", "train", seed=0, augment=False)


def _palette(ids: list[list[int]], colors: list[tuple[int, int, int]]) -> Image.Image:
    mask = Image.fromarray(np.array(ids, np.uint8), "P")
    mask.putpalette([channel for color in colors for channel in color])
    return mask


SKY, ROAD, CAR = (70, 130, 180), (128, 64, 128), (0, 0, 142)


def test_a_palette_per_mask_is_refused_with_two_names(tmp_path: Path) -> None:
    first, second = [[0, 0, 1]] * 2, [[0, 1, 1]] * 2
    masks = [_palette(first, [SKY, ROAD, CAR]), _palette(second, [SKY, CAR])]
    with pytest.raises(
        AcamkdError, match=r"[01]\.png: the palette's color 1 is #.* in .*/[01]\.png: the values"
    ) as error:
        data.check(_two(tmp_path, masks, ("sky", "road", "car")), "full")
    assert "#804080" in str(error.value)
    assert "#00008e" in str(error.value)
    colors = {"70, 130, 180": "sky", "#804080": "road", "#00008E": "car"}
    dataset = _two(tmp_path, masks, ("sky", "road", "car"), mask_values=colors)
    assert data.check(dataset, "full") == []
    assert [target["mask"][0].tolist() for _, target in dataset] == [[0, 0, 1], [0, 2, 2]]
    values = {0: "sky", 1: "road", 2: "car"}  # the values are meant
    dataset = _two(tmp_path, masks, ("sky", "road", "car"), mask_values=values)
    assert data.check(dataset, "full") == []
    assert dataset[1][1]["mask"][0].tolist() == [0, 1, 1]


def test_colors_that_no_pixel_has_do_not_matter(tmp_path: Path) -> None:
    masks = [_palette([[0, 0, 1]] * 2, [SKY, ROAD]), _palette([[0, 1, 1]] * 2, [SKY, ROAD, CAR, CAR])]
    masks.append(Image.fromarray(np.ones((2, 3), np.uint8)))
    dataset = _two(tmp_path, masks, ("sky", "road", "car"))
    assert data.check(dataset, "full") == []


def test_palettes_of_training_and_validation_are_compared(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    train, val = (
        _two(tmp_path / name, [_palette([[0, 0, 1]] * 2, [SKY, color])], ("sky", "road"))
        for name, color in (("a", ROAD), ("b", CAR))
    )
    for split in (train, val):
        data.check(split, "full")
    with pytest.raises(AcamkdError, match=r"b/masks/0\.png: the palette's color 1 is #00008e, but #804080 in .*a/"):
        data.compare_splits(train, val, config.Data())


@pytest.mark.parametrize(("width", "cause"), [(4, ""), (20, "JPEG and resizing leave so many colors behind.*")])
def test_colors_that_jpeg_has_blurred(tmp_path: Path, width: int, cause: str) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        colors = np.arange(width * 6, dtype=np.uint8).reshape(2, width, 3)
        Image.fromarray(colors).save(tmp_path / folder / "a.png")
    ids = {(0, 0, 0): 0, (255, 0, 0): 1}
    dataset = MaskFolder(tmp_path / "images", tmp_path / "masks", ("sky", "road"), ids=ids)
    message = rf"void are #000000, #ff0000 \({cause}data\.mask_values says what further colors mean\)"
    with pytest.raises(AcamkdError, match=message):
        data.check(dataset, "full")


def test_a_void_of_0_is_no_foreground(tmp_path: Path) -> None:
    dataset = _two(tmp_path, [[[0, 1, 1]] * 2], ("none", "road"), ignore_index=0)
    assert _absent(dataset) == [
        "no training image has a pixel of the class none: the networks cannot learn it; the value 0 is void, as "
        "data.ignore_index says, and so no pixel is none"
    ]
    dataset = _two(tmp_path, [[[1, 1, 7]] * 2], ("sky", "road"), ignore_index=7)
    assert "if the masks' values begin with 1" in _absent(dataset)[0]


def test_where_the_recipe_says_what_values_mean_no_advice_is_given(tmp_path: Path) -> None:
    meant = {0: "sky", 1: "crack", 2: "void"}
    dataset = _two(tmp_path, [[[0, 2, 2]] * 2], ("sky", "crack"), mask_values=meant)
    assert _absent(dataset) == ["no training image has a pixel of the class crack: the networks cannot learn it"]


def test_masks_that_are_all_void(tmp_path: Path) -> None:
    void, known = [[255] * 3] * 2, [[0, 1, 1]] * 2
    (warning,) = data.check(_two(tmp_path, [void, known, void], ("sky", "road")), "full")
    assert warning == "2 of 3 masks hold nothing but void: nothing is learned from them"
    with pytest.raises(AcamkdError, match=r"none of the 3 images has a pixel that is not void: nothing can be learned"):
        data.check(_two(tmp_path, [void] * 3, ("sky", "road")), "full")
