"""The command line as its users see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias


class Result:
    """What a command left behind."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The message after `error:`; nothing may follow it."""
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == 1, self.err
        return self.err.partition("error: ")[2]


Command: TypeAlias = Callable[..., Result]
"""`acamkd(*words)`."""
