"""Class names as they can be drawn: in a font that has their letters, or by the letters' names. Needs no torch."""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

OWN_FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
"""Comes with matplotlib: most alphabets, but neither Chinese, Japanese and Korean nor emoji."""


@cache
def font_for(text: str, size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font that has every letter of what `drawable` gave."""
    if text.isascii():
        return ImageFont.load_default(size)
    file = _font_of(text)
    return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)


@cache
def drawable(text: str, *, own_font: bool = False) -> str:
    """The text itself where one font has all of it; otherwise with letters that the own font lacks written out.

    Args:
        text: Such as a class name.
        own_font: No other font than matplotlib's can be used.
    """
    text = unicodedata.normalize("NFC", text)
    if text.isascii() or (_has(OWN_FONT, text) if own_font else _font_of(text) is not None):
        return text
    return " ".join("".join(letter if _has(OWN_FONT, letter) else _written_out(letter) for letter in text).split())


def _written_out(letter: str) -> str:
    """A letter by its sound or name: `ko ` for a Japanese one, `dog face ` for an emoji; ideographs by their code."""
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # marks and joiners between the parts of an emoji
        return ""
    name = unicodedata.name(letter, "")
    if not name or name.startswith("CJK "):
        return f"U+{ord(letter):04X} "
    return (name.rpartition(" ")[2] if " LETTER " in name or " SYLLABLE " in name else name).lower() + " "


@cache
def _font_of(text: str) -> Path | None:
    """The own font, or the first one on this machine, that has every letter; None where none has."""
    others = sorted({font.fname for font in font_manager.fontManager.ttflist})
    return next((file for file in (OWN_FONT, *map(Path, others)) if _has(file, text)), None)


def _has(file: Path, text: str) -> bool:
    return set(map(ord, text)) <= _letters(file)


@cache
def _letters(file: Path) -> frozenset[int]:
    try:
        return frozenset(FT2Font(str(file)).get_charmap())
    except (OSError, RuntimeError, ValueError):  # the list of fonts is a cache, and bitmaps cannot be scaled
        return frozenset()
