"""Results that print themselves: as a table in a terminal and in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod

from rich.console import Console, RenderableType
from rich.jupyter import JupyterMixin

WIDTH = 120
"""Columns of what `str` gives, which knows no terminal."""


class Printable(JupyterMixin, ABC):
    """What a job returns. `print` and the last line of a notebook's cell show what `__rich__` gives."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """A table, or text, of rich."""

    def __str__(self) -> str:
        console = Console(width=WIDTH, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")
