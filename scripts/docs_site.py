"""MkDocs hook: publish the files outside docs/ that the documentation links to.

Links in the sources are relative to the repository, so that they also work on a forge. On the site README.md becomes
the front page, and the other published files lie beside the pages of docs/. Links to other files, such as source code,
become plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
"""Page of the repository -> its name on the site."""

_LINK = re.compile(r"\[([^\]]*)\]\(((?!https?:|mailto:|#)[^)\s#]+)(#[^)\s]*)?\)")


def published() -> dict[str, str]:
    """Return the files outside docs/ that are on the site: path in the repository -> path on the site."""
    experiments = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "experiments").glob("*.*"))]
    return PAGES | {path: path for path in [*experiments, "cluster.yaml", "LICENSE"]}


def on_files(files: Any, config: Any) -> Any:
    """Add the published files; called by MkDocs with the files of docs/."""
    for source, target in published().items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the links of one page from places in the repository to places on the site."""
    sources = {target: source for source, target in PAGES.items()}
    source = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda link: _rewritten(link, source, page.file.src_uri), markdown)


def _rewritten(link: re.Match[str], source: str, page: str) -> str:
    text, target, anchor = link[1], link[2], link[3] or ""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    known = published()
    if path.startswith("docs/"):
        place = path.removeprefix("docs/")
    elif path in known:
        place = known[path]
    elif (ROOT / path).exists():
        return text
    else:
        return link[0]  # MkDocs reports it
    return f"[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"
