"""What the site derives: its navigation from the folders, the API page from the package, links into the source."""

import re
from pathlib import Path
from typing import Any

import acamkd
import acamkd.losses

SECTIONS = {"start": "Get started", "guides": "Guides", "methods": "Methods", "reference": "Reference",
            "research": "Research"}  # fmt: skip
"""Folders of pages, in the order of the navigation."""

EXTENDED = ("losses/base.py", "models/base.py", "data/dataset.py")
"""Files with what an extension of acamkd derives from."""

SOURCE = Path(__file__).parents[1] / "src/acamkd"


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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`<!-- api -->` -> the API; `[name](../../src/acamkd/losses/cwd.py)` -> the place of that module in it."""
    root = "../" * page.file.src_uri.count("/")

    def place(match: re.Match[str]) -> str:
        return f"]({root}reference/api.md#{match[1].replace('/', '.')})"

    return re.sub(r"\]\((?:\.\./)+src/([\w/]+)\.py\)", place, markdown).replace("<!-- api -->", api())


def api() -> str:
    """Directives for mkdocstrings: the package's own names, what an extension derives from, and every loss."""
    extended = [SOURCE / file for file in EXTENDED]
    losses = [file for file in sorted((SOURCE / "losses").rglob("[!_]*.py")) if file not in extended]
    flat = sorted(set(dir(acamkd)) - set(vars(acamkd.losses)), key=str.lower)
    sections = {
        "The package": [f"::: acamkd.{name}" for name in flat],
        "Base classes": [_module(file) for file in extended],
        "Losses": [_module(file) for file in losses],
    }
    return "\n\n".join(line for title, entries in sections.items() for line in (f"## {title}", *entries))


def _module(file: Path) -> str:
    """The directive for a module, by its full name: several are called `base`."""
    name = ".".join(("acamkd", *file.relative_to(SOURCE).with_suffix("").parts))
    return f"::: {name}\n    options: {{show_root_full_path: true}}"
