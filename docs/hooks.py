"""Links of the pages into the source lead to the API page on the site, which shows that source."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`[name](../../src/acamkd/losses/cwd.py)` -> the place of acamkd.losses.cwd on the API page."""
    root = "../" * page.file.src_uri.count("/")

    def place(match: re.Match[str]) -> str:
        return f"]({root}reference.md#{match[1].replace('/', '.')})"

    return re.sub(r"\]\((?:\.\./)+src/([\w/]+)\.py\)", place, markdown)
