"""The examples in README.md and docs/ run, and their assertions hold: on the GPU if there is one, else on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if page.exists()]

# A fence may be indented, in a list. `<!-- no-test -->` on the line before it leaves the block out.
BLOCK = re.compile(
    r"^(?P<skip>[ \t]*<!-- no-test -->\n(?:[ \t]*\n)?)?(?P<indent>[ \t]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str) -> list[tuple[int, str]]:
    """Line numbers and code of the blocks to run."""
    found = []
    for match in BLOCK.finditer(text):
        if match["skip"] is None:
            line = text.count("\n", 0, match.start("code"))
            found.append((line, re.sub(rf"^{match['indent']}", "", match["code"], flags=re.MULTILINE)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page, tmp_path, monkeypatch):
    """In order and in one namespace, as a reader would run them. A traceback shows the page's own line."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code in blocks(page.read_text()):
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
"""
    assert blocks(page) == [(2, "a = 1\n"), (16, "if a:\n    b = 2\n")]


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
