"""What the site derives from the repository.

These are its navigation, the API pages, links into the source, the replay of masks, and reports of the comparisons.
"""

import re
from pathlib import Path
from typing import Any

import acamkd.config
import acamkd.data
import acamkd.losses
import acamkd.models
from acamkd.jobs.compare import trials_csv
from acamkd.jobs.compare.page import write_page
from acamkd.jobs.compare.statistics import summarize
from acamkd.jobs.compare.trials import TUNING_SEED

SECTIONS = {"start": "Get started", "guides": "Guides", "concepts": "Concepts", "methods": "Methods",
            "reference": "Reference", "research": "Research"}  # fmt: skip
"""Folders of pages, in the order of the navigation."""

EXTENDED = ("losses/base.py", "models/base.py", "data/dataset.py", "data/boxes.py", "data/formats/masks.py")
"""Files with what an extension of acamkd derives from."""

PACKAGES = (acamkd.config, acamkd.data, acamkd.models)
"""Packages whose public names are part of the API, beside those of acamkd itself."""

RESULTS = (
    "engine.runs.Run", "engine.step_profile.StepProfile", "jobs.evaluate.Scores", "jobs.run_all.RunAll",
    "jobs.compare.compare.ComparisonResult", "jobs.compare.statistics.Row", "jobs.compare.statistics.Paired",
    "jobs.estimate.Estimate", "jobs.estimate.Part", "jobs.doctor.Diagnosis", "jobs.doctor.Finding",
    "jobs.examine_data.DataReport", "data.statistics.Statistics", "jobs.inspect_layers.Inspection",
    "jobs.init.init.Proposal", "jobs.export.export.Export", "jobs.export.export.Measured",
    "jobs.benchmark.result.Benchmark", "jobs.benchmark.result.Row", "jobs.predict.result.Predictions",
    "jobs.demo.demo.Demo",
)  # fmt: skip
"""What the package's functions return."""

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/acamkd"

REPLAY = """<style>
main { padding: 0 } main > :not(#viewer) { display: none } #viewer { margin: 0 }
</style>
</head>"""
"""Ends the head of a report of which only the viewer shall be seen."""

COMPARED = {"camvid_few": "camvid_few_all", "bccd_few": "bccd_few"}
"""Study -> the comparison of which the site has a report."""


def on_config(config: Any) -> None:
    """Every page is in the navigation, in its folder's section."""
    docs = Path(config.docs_dir)
    config.nav = [{"Home": "index.md"}, *({title: pages_of(docs, folder)} for folder, title in SECTIONS.items())]


def pages_of(docs: Path, folder: str) -> list[str]:
    """A folder's index first, then its pages in the order in which the home page links to them, then all others."""
    home = (docs / "index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(docs).as_posix() for path in sorted((docs / folder).glob("*.md"))]
    linked = [page for page in re.findall(r"\]\(([\w/-]+\.md)", home) if page in pages]
    return list(dict.fromkeys([page for page in (f"{folder}/index.md", *linked, *pages) if page in pages]))


def on_post_build(config: Any) -> None:
    """Pages beside those of the documentation: the viewer of a report alone, and a report of each comparison."""
    site = Path(config.site_dir)
    report = (site / "scenes-report.html").read_text(encoding="utf-8")
    (site / "replay.html").write_text(report.replace("</head>", REPLAY, 1), encoding="utf-8")
    (site / "reports").mkdir(exist_ok=True)
    for study, comparison in COMPARED.items():
        folder = ROOT / "studies" / study
        trials = list(trials_csv.comparisons(folder / trials_csv.FILE)[comparison].values())
        compared = [trial for trial in trials if trial["seed"] < TUNING_SEED]
        tuning = [trial for trial in trials if trial["seed"] >= TUNING_SEED]
        recipe = acamkd.config.load(folder / "recipe.yaml")
        write_page(site / f"reports/{study}.html", recipe, summarize(compared), compared, tuning)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`<!-- api: package -->` -> that part of the API; `[name](../../src/acamkd/losses/cwd.py)` -> its place there."""
    root = "../" * page.file.src_uri.count("/")

    def place(match: re.Match[str]) -> str:
        return f"]({root}reference/api-losses.md#{match[1].replace('/', '.')})"

    markdown = re.sub(r"\]\((?:\.\./)+src/([\w/]+)\.py\)", place, markdown)
    # Elsewhere a table's code needs `\|` for `|`; here it would show the backslash.
    markdown = re.sub(r"`[^`\n]+`", lambda code: code[0].replace("\\|", "|"), markdown)
    return re.sub(r"<!-- api: (\w+) -->", lambda match: "\n\n".join(API[match[1]]()), markdown)


def _package() -> list[str]:
    """The package's own names; the losses have a page of their own."""
    return [f"::: acamkd.{name}" for name in sorted(set(dir(acamkd)) - set(vars(acamkd.losses)), key=str.lower)]


def _results() -> list[str]:
    return [f"::: acamkd.{name}\n    options: {{show_root_full_path: true}}" for name in RESULTS]


def _bases() -> list[str]:
    return [_module(SOURCE / file) for file in EXTENDED]


def _losses() -> list[str]:
    files = sorted((SOURCE / "losses").rglob("[!_]*.py"))
    return [_module(file) for file in files if file.relative_to(SOURCE).as_posix() not in EXTENDED]


def _packages() -> list[str]:
    """Every public name of the packages that a script imports from."""
    lines = []
    for package in PACKAGES:
        names = sorted(package.__all__, key=str.lower)
        lines += [f"## {package.__name__}", *(f"::: {package.__name__}.{name}" for name in names)]
    return lines


API = {"package": _package, "results": _results, "bases": _bases, "losses": _losses, "packages": _packages}
"""What a page of the API asks for by this word -> its directives for mkdocstrings."""


def _module(file: Path) -> str:
    """The directive for a module, by its full name: several are called `base`."""
    name = ".".join(("acamkd", *file.relative_to(SOURCE).with_suffix("").parts))
    return f"::: {name}\n    options: {{show_root_full_path: true}}"
