from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw

from acamkd.report import lettering
from acamkd.report.lettering import OWN_FONT, drawable, font_for
from acamkd.report.visualize import Block, draw_predictions, draw_sheet


@pytest.fixture(autouse=True)
def _own_font_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a server, which has no fonts of its own."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    functions = (lettering.font_for, lettering.drawable, lettering._font_of)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("dog", "dog"),
        ("Käfer", "Käfer"),
        ("Ka\u0308fer", "Käfer"),  # decomposed, as macOS writes file names
        ("кошка", "кошка"),
        ("猫", "U+732B"),
        ("ネコ", "ne ko"),
        ("고양이", "go yang i"),
        ("\U0001f984 unicorn", "unicorn face unicorn"),
    ],
)
def test_names_in_every_script_can_be_drawn(name: str, drawn: str) -> None:
    assert drawable(name) == drawn
    assert set(map(ord, drawable(name))) <= lettering._letters(OWN_FONT)


def _pixels(letter: str) -> bytes:
    image = Image.new("L", (60, 60))
    ImageDraw.Draw(image).text((5, 5), letter, fill=255, font=font_for(letter, 40))
    return image.tobytes()


def test_letters_differ_from_the_box_that_stands_for_none() -> None:
    drawn = {_pixels(letter) for letter in "äöüßéñжλ"}
    assert len(drawn) == 8
    assert _pixels("\ue000") not in drawn


def test_a_font_of_the_machine_is_taken_where_it_has_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = lettering._letters
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font_manager.FontEntry(fname="/fonts/cjk.ttf")])
    monkeypatch.setattr(lettering, "_letters", lambda file: {ord("猫")} if file.stem == "cjk" else letters(file))
    assert drawable("猫") == "猫"
    assert str(lettering._font_of("猫")) == "/fonts/cjk.ttf"


def test_overlays_and_sheets_draw_such_names() -> None:
    found = {"boxes": np.array([[10.0, 10, 190, 190]]), "labels": np.array([1])}
    image = np.zeros((200, 200, 3), np.uint8)
    drawn = {name: draw_predictions(image, found, (name,)).tobytes() for name in ("猫", "犬", "Käfer", "Kafer")}
    assert len(set(drawn.values())) == 4
    figure = draw_sheet([Block("t", ["c"], [[image]])], {"猫": 1, "Käfer": 2})
    [legend] = figure.subfigs[-1].legends
    assert [text.get_text() for text in legend.get_texts()] == ["U+732B", "Käfer"]
