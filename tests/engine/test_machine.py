from __future__ import annotations

import os

import pytest

from acamkd.engine import machine


def test_the_processor_is_named() -> None:
    assert machine.processor()
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("flags", "expected"), [
    ("fpu avx2 avx512_vnni amx_int8", "amx_int8"), ("fpu avx2 avx_vnni", "avx_vnni"), ("fpu avx2 avx512f", None),
])  # fmt: skip
def test_its_instructions_for_8_bits(flags: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpuinfo", lambda name: flags if name == "flags" else "")
    assert machine.int8_instructions() == expected
