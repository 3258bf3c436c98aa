"""Builds the site of these pages and the installed package's docstrings: sphinx-build -W -n docs site"""

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.inspect import TypeAliasForwardRef

import fused_copy

ROOT = Path(__file__).parents[1]
# Of whoever publishes the site, as setup.py has it for the links of a release.
REPOSITORY = os.environ.get("FUSED_COPY_REPOSITORY", "https://github.com/fused-copy/fused-copy")

project = "fused-copy"
release = version = fused_copy.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4

html_theme = "pydata_sphinx_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "icon_links": [{"name": "Repository", "url": REPOSITORY, "icon": "fa-brands fa-github"}],
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "navbar_persistent": ["search-button"],
    "pygments_light_style": "tango",  # it and the next show what a patch adds and takes away
    "pygments_dark_style": "monokai",
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"**": []}  # the header has all pages, and code the room

python_use_unqualified_type_names = True
# Signatures show these by their names, which the reference explains, and not what they stand for.
autodoc_type_aliases = {
    name: name
    for name in ("Backend", "Fill", "Fills", "Source", "Sources", "StepCall", "StepSource", "Tensors", "Values")
}
TypeAliasForwardRef.__repr__ = lambda alias: alias.name  # which Sphinx shows where an alias is part of a union
nitpick_ignore_regex = [
    # The site is built without a network, so without the inventories of torch's and Python's documentation.
    (r"py:.*", r"torch\..*|RuntimeError|TypeError|KeyError|ValueError|bool|int|str|None"),
]


class LinkRepositoryFiles(SphinxTransform):
    """A link to a file that is no page of the site leads to the repository."""

    default_priority = 10

    def apply(self, **_: object) -> None:
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for kind in (addnodes.download_reference, addnodes.pending_xref):
            for node in [node for node in self.document.findall(kind) if node["reftype"] == "myst"]:
                is_markdown = node["refdomain"] == "doc"
                file = folder / (node["reftarget"] + ".md" * is_markdown)
                if file.exists() and not (is_markdown and node["reftarget"] in self.env.found_docs):
                    anchor = f"#{node['reftargetid']}" if node.get("reftargetid") else ""
                    url = f"{REPOSITORY}/blob/main/{file.resolve().relative_to(ROOT)}{anchor}"
                    node.replace_self(nodes.reference("", "", *node.children, refuri=url))


def include_files(app, docname: str, source: list[str]) -> None:
    """Shows a file, from a line on, for ``--8<-- "path:line"`` alone in a block of code. A patch is folded."""

    def shown(block: re.Match[str]) -> str:
        path = Path(block["path"])
        options = f":language: {block['language']}\n:lines: {block['line'] or 1}-"
        include = f"```{{literalinclude}} /../{path}\n{options}\n```"
        if path.suffix != ".patch":
            return include
        lines = (ROOT / path).read_text().count("\n")
        return f"<details><summary>{path.name}, {lines} lines</summary>\n\n{include}\n\n</details>"

    block = r'^```(?P<language>\w+)\n--8<-- "(?P<path>[^":]+)(?::(?P<line>\d+))?"\n```$'
    source[0] = re.sub(block, shown, source[0], flags=re.MULTILINE)


def resolve_alias(app, env, node, contnode):
    """Annotations ask for classes, by whatever name they have there, and an alias of types is data."""
    if node["reftarget"] not in autodoc_type_aliases:
        return None
    node["refspecific"] = True
    return env.domains.python_domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", node["reftarget"], node, contnode
    )


def setup(app) -> None:
    app.add_transform(LinkRepositoryFiles)
    app.connect("source-read", include_files)
    app.connect("missing-reference", resolve_alias)
