"""What the site adds to docs/: the README, CONTRIBUTING and the examples as pages.

Links are written for the repository, where README.md is at the top, and changed here to those of
the site.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Files outside of docs/ that are pages of the site, by their path in the repository.
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
# The package as one tree, for the reader of docstrings; removed when the build ends.
SOURCES = TemporaryDirectory()
LINK = re.compile(r"(\]\()([^)\s#]+)")


@event_priority(100)
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Names the tree that docstrings are read from."""
    package = Path(SOURCES.name, "mdiff")
    if not package.exists():
        # Kernels and samplers are links to folders without __init__.py, which griffe does not read.
        shutil.copytree(
            ROOT / "mdiff",
            package,
            ignore=lambda folder, names: [
                name
                for name in names
                if not Path(folder, name).is_dir() and not name.endswith(".py")
            ],
        )
        for folder in ("kernels", "kernels/gpu", "samplers"):
            Path(package, folder, "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [SOURCES.name]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of files that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for source in sorted((ROOT / "examples").glob("*.py")):
        code = source.read_text(encoding="utf-8")
        text = f"# {source.name}\n\n    python examples/{source.name}\n\n```python\n{code}```\n"
        files.append(File.generated(config, f"examples/{source.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with the links of the site."""
    source = {to: path for path, to in PAGES.items()}.get(page.file.src_uri)
    folder = posixpath.dirname(source if source else f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, link[2]))
        return link[1] + posixpath.relpath(site_path(path), here or ".")

    return LINK.sub(moved, markdown)


def site_path(path: str) -> str:
    """The path below docs/ of a file of the repository."""
    if path.startswith("examples/"):
        return path.removesuffix(".py") + ".md"
    return PAGES.get(path, path.removeprefix("docs/"))
