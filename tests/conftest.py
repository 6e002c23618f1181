"""Every test starts from the same random and logging state and keeps to one thread: workers do not fight for cores."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from acamkd import cli
from acamkd.report.run import write_report
from browser import Browser, screenshots
from command import Command, Result

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start; they do not measure how many are fastest


def _drawing_on_the_cpu(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def drawn(*args: Any, generator: torch.Generator | None = None, **options: Any) -> torch.Tensor:
        if generator is None:
            return draw(*args, **options)
        return draw(*args, **{**options, "generator": generator, "device": "cpu"}).to(DEVICE)

    return drawn


if DEVICE := os.environ.get("ACAMKD_TEST_DEVICE"):  # benchmarks/gpu.py: every tensor on a GPU
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False
    for drawing in ("rand", "randn"):  # a generator of the CPU draws the same there as ever
        setattr(torch, drawing, _drawing_on_the_cpu(getattr(torch, drawing)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """The command line sets a level and a handler of its own."""
    log, root = logging.getLogger("acamkd"), logging.getLogger()
    level, handlers = log.level, list(root.handlers)
    yield
    log.setLevel(level)
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _without_reports() -> Iterator[None]:
    """Trainings leave no report, which takes longer than they do, but where a test asks for `reports`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acamkd.jobs.fit.write_report", lambda run: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _caches_on_any_disk() -> Iterator[None]:
    """Caches fill a disk to its end, so that the tests pass on one with less left than a cache leaves free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acamkd.data.disk_cache.RESERVE", 0)
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings leave a report, as outside of the tests."""
    monkeypatch.setattr("acamkd.jobs.fit.write_report", write_report)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A real browser; tests that ask for it are skipped where there is none."""
    folder = tmp_path_factory.mktemp("browser")
    found = Browser(folder / "profile", screenshots(folder / "screenshots"))
    yield found
    found.driver.quit()


@pytest.fixture
def acamkd(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `acamkd WORDS` as the installed command does, in this process."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["acamkd", *map(str, words)])
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Result(code, *capsys.readouterr())

    return run
