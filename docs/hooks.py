"""What Markdown pages need that were written to be read in the repository, and docstrings in an editor."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    # Links to the repository's files lead nowhere on the site.
    outside = r"(?:(?:benchmarks|examples|tests|tools)/[^)]*|SECURITY\.md)"
    return re.sub(rf"\[([^\]]+)\]\((?:\.\./)+{outside}\)", r"\1", markdown)


def on_page_content(html: str, **_: object) -> str:
    return re.sub(r":(?:func|meth|class):(<code>)~?", r"\1", html).replace("to::</p>", "to:</p>")
