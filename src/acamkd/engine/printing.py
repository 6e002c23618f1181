"""Results that print as a table, in a terminal and in a notebook."""

from __future__ import annotations

from abc import ABC, abstractmethod

from rich.console import Console, RenderableType
from rich.jupyter import JupyterMixin

WIDTH = 120
"""Width in characters of the text that `str` returns."""


class Printable(JupyterMixin, ABC):
    """Base class of the jobs' results: `print` and a notebook cell show what `__rich__` returns."""

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Return a rich table or text."""

    def __str__(self) -> str:
        console = Console(width=WIDTH, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip("\n")
