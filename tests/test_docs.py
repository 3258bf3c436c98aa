"""The examples in README.md and docs/ run, and their assertions hold: on the GPU if there is one, else on the CPU."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch

import fused_copy

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]

# A fence may be indented, in a list. On the line before it `<!-- no-test -->` leaves the block out, and
# `<!-- needs-gpu -->` does where there is no GPU.
BLOCK = re.compile(
    r"^(?:[ \t]*<!-- (?P<skip>no-test|needs-gpu) -->\n(?:[ \t]*\n)?)?"
    r"(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str, *, gpu: bool) -> list[tuple[int, str]]:
    """Line numbers and code of the blocks to run."""
    found = []
    for match in BLOCK.finditer(text):
        if match["skip"] is None or (gpu and match["skip"] == "needs-gpu"):
            line = text.count("\n", 0, match.start("code"))
            found.append((line, re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would run them. A traceback shows the page's own line."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page.read_text(), gpu=torch.cuda.is_available()):
        exec(compile("\n" * line + code, page, "exec"), namespace)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def test_what_counts_as_a_block():
    page = """
```python
a = 1
```
<!-- no-test -->
```python
raise AssertionError
```

<!-- no-test -->

```python
raise AssertionError
```
- In a list:
  ```python
  if a:
      b = 2
  ```
```sh
no python
```
<!-- needs-gpu -->
```python
c = 3
```
"""
    anywhere = [(2, "a = 1\n"), (16, "if a:\n    b = 2\n")]
    assert blocks(page, gpu=False) == anywhere
    assert blocks(page, gpu=True) == [*anywhere, (24, "c = 3\n")]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)  # the README is no page of the site
def test_code_is_not_cut(page):
    """As wide as docs/_static/site.css has room for on a screen of 1,280 px."""
    for fence in re.findall(r"^[ \t]*```.*?^[ \t]*```", page.read_text(), re.MULTILINE | re.DOTALL):
        assert max(map(len, fence.splitlines())) <= 120, fence


def in_the_reference() -> dict[str, str]:
    """By what docs/reference.md names, members after their class: the directive that does."""
    page, owner, directives = (ROOT / "docs/reference.md").read_text(), "", {}
    for indent, directive, name in re.findall(r"^( *)\.\. ([\w:]+):: ([\w.]+)", page, re.MULTILINE):
        owner = owner if indent else name
        directives[f"{owner}.{name}" if indent else name] = directive
    return directives


def test_the_reference_has_all_that_is_public_and_nothing_else():
    named = in_the_reference()
    assert {f"fused_copy.{name}" for name in fused_copy.__all__} <= named.keys()
    private = {name for name in named if any(part.startswith("_") for part in name.split("."))}
    assert private == {"fused_copy.__version__"}
    for name in [name for name, directive in named.items() if directive == "autoclass"]:
        kind = resolve_name(name)
        members = {member for member in vars(kind).keys() | inspect.get_annotations(kind) if member[0] != "_"}
        _, _, attributes = (inspect.getdoc(kind) or "").partition("Attributes:\n")
        assert members - {*re.findall(r"^    (\w+): ", attributes, re.MULTILINE)} == {
            member.removeprefix(f"{name}.") for member in named if member.startswith(f"{name}.")
        }, name


def test_what_the_reference_shows_is_of_the_thing_itself():
    """And not what Python falls back to, the docstring of its type."""
    for name, directive in in_the_reference().items():
        if directive in ("autofunction", "autoclass", "automethod", "autoproperty"):
            thing = resolve_name(name)
            assert inspect.getdoc(thing) not in (None, inspect.getdoc(type(thing))), name


def found(pattern: str, file: str) -> list[str]:
    return re.findall(pattern, (ROOT / file).read_text())


def test_supported_torches():
    """.ci/run lists what is tested, pyproject.toml the oldest; others name some of these."""
    tested = re.findall(r"\d+\.\d+\.\d+", " ".join(found(r"torches=\((.*)\)", ".ci/run")))
    for workflow in ("gpu", "wheels"):
        assert {*found(r"torch(?:==|: )(\d[\d.]*)", f".github/workflows/{workflow}.yml")} <= {*tested}
    oldest = min(tested, key=lambda version: [*map(int, version.split("."))]).rpartition(".")[0]
    assert found(r'dependencies = \["torch>=(.*)"', "pyproject.toml") == [oldest]
    assert found(r"torch from (\S+) up", "README.md") == [oldest]


def test_supported_pythons():
    """wheels.yml lists them, and CI's own stage compares it with pyproject.toml's list for cibuildwheel."""
    wheels = sorted({*map(int, found(r"\bcp3(\d+)\b", ".github/workflows/wheels.yml"))})
    oldest, newest = f"3.{wheels[0]}", f"3.{wheels[-1]}"
    assert found(r'requires-python = ">=(.*)"', "pyproject.toml") == [oldest]
    assert found(r'"Programming Language :: Python :: 3\.(\d+)"', "pyproject.toml") == [*map(str, wheels)]
    assert found(r"with Python (\S+) or newer", "CONTRIBUTING.md") == [oldest]
    assert found(r"python: (\[.*\])", ".github/workflows/ci.yml") == [f'["{oldest}", "{newest}"]']


def test_builds_without_isolation_have_the_same_requirements():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["build"] == project["build-system"]["requires"]
