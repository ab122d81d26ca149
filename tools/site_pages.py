"""Pages of the site that stand elsewhere in the repository: README.md and CHANGELOG.md.

MkDocs calls `on_files` (mkdocs.yml, `hooks`). Their links are those of a reader of the repository:
those into docs/ are made relative to it, and what is no page becomes plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository and the pages that they are."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def as_page(text: str) -> str:
    """Markdown of the repository's root as it has to read in docs/."""

    def link(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        page = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is None:
            return label
        return f"{image}[{label}]({page}{'#' + anchor if anchor else ''})"

    return _LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to those that MkDocs found in docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=as_page(text)))
    return files
