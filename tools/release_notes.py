"""Prints what CHANGELOG.md says of a version, for its release: python tools/release_notes.py 0.1.0"""

from __future__ import annotations

import re
import sys
from pathlib import Path


def notes(changelog: str, version: str) -> str:
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if heading.startswith(f"[{version}]") and text.strip():
            return text.strip()
    sys.exit(f"CHANGELOG.md has nothing under '## [{version}]': move there what it has under Unreleased")


if __name__ == "__main__":
    print(notes(Path(__file__).parents[1].joinpath("CHANGELOG.md").read_text(), sys.argv[1]))
