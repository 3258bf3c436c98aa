"""The benchmark's results: the machine they belong to, their file, and tables of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from fill_benchmark.peers import CONTIGUOUS, PEERS, SIX_COPIES
from fill_benchmark.sources import ROWS, VALUES
from fused_copy.bench import format_ratio, format_us, print_table


@dataclass(frozen=True)
class Row:
    """One peer at one point: times in us per call, ``bytes`` and ``launches`` per call too.

    ``metric`` is what was timed, as in :class:`fill_benchmark.sections.Section`; ``kernel`` the launch parameters and
    the occupancy, where the section looks at them; ``passes`` the medians of all passes, where there were several.
    """

    section: str
    metric: str
    workload: str
    point: dict[str, int]
    case: str
    bytes: int
    peer: str
    launches: int | None
    median: float
    p10: float
    p90: float
    kernel: dict[str, object] | None = None
    passes: list[float] | None = None


@dataclass(frozen=True)
class Verdict:
    """A target's condition and the worst figure of a run; ``met`` is None where the run did not measure it.

    ``limit`` is what the run measured of why no better figure was there, or that it does not explain it.
    """

    target: str
    figure: str
    condition: str
    measured: float | None
    at: str
    met: bool | None
    limit: str = ""


@dataclass(frozen=True)
class Results:
    """One run. A ``quick`` one shows that everything works, not how fast it is. ``seconds`` are those of each section.
    One that is not ``complete`` was stopped.

    ``answers`` are facts drawn from the rows, by the question that they answer; ``package`` what the targets ask of the
    package itself: ``import_ms``, ``wheel_mb`` and ``build_seconds``, as far as they are known.
    """

    machine: dict[str, str | None]
    quick: bool
    rows: Sequence[Row]
    targets: Sequence[Verdict] = ()
    answers: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    package: dict[str, float] = field(default_factory=dict)
    complete: bool = True


def serialize(results: Results) -> str:
    """A results file's text: JSON, each row and each verdict on a line of its own."""
    lists: dict[str, Sequence[Row | Verdict]] = {"targets": results.targets, "rows": results.rows}
    head = {key: value for key, value in vars(results).items() if key not in lists}
    text = json.dumps(head, indent=2).removesuffix("\n}")
    for name, items in lists.items():
        lines = ",\n".join(f"    {json.dumps(_plain(item))}" for item in items)
        text += f',\n  "{name}": [\n{lines}\n  ]'
    return text + "\n}\n"


def _plain(item: Row | Verdict) -> dict[str, object]:
    plain = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(item).items()}
    return {key: value for key, value in plain.items() if value is not None or key not in ("kernel", "passes")}


def read(path: Path) -> Results:
    """Read what :func:`serialize` made."""
    content = json.loads(path.read_text())
    rows, targets = [Row(**row) for row in content.pop("rows")], [Verdict(**v) for v in content.pop("targets")]
    return Results(rows=rows, targets=targets, **content)


def print_machine(console: Console, machine: dict[str, str | None]) -> None:
    """Print the machine's facts."""
    console.print(", ".join(f"{key} {value}" for key, value in machine.items() if value))


def print_peers(console: Console) -> None:
    """Print every way's name and what it is."""
    for name, factory in (PEERS | VALUES | ROWS).items():
        # Docstrings are reStructuredText.
        what = re.sub(r":\w+:`([^`]*)`|``", r"\1", (factory.__doc__ or "").partition("\n")[0])
        console.print(name, style="bold")
        console.print(Padding(what, (0, 0, 0, 2)))
    console.print()


def print_point(console: Console, rows: Sequence[Row]) -> None:
    """Print what one metric of one point is for every way, with the spread and the ratios to the two yardsticks."""
    first = rows[0]
    medians = {(row.case, row.peer): row.median for row in rows}
    slices, contiguous = ([medians.get((row.case, way)) for row in rows] for way in (SIX_COPIES, CONTIGUOUS))
    columns = {
        "way": [f"{row.case}: {row.peer}" if row.case else row.peer for row in rows],
        "launches": ["" if row.launches is None else str(row.launches) for row in rows],
        f"{first.metric}\nus": [format_us(row.median) for row in rows],
        "p10-p90": [f"{format_us(row.p10)}-{format_us(row.p90)}" for row in rows],
        "vs\nslices": [format_ratio(us / row.median) if us else "" for us, row in zip(slices, rows, strict=True)],
        "of one\ncopy": [format_ratio(row.median / us) if us else "" for us, row in zip(contiguous, rows, strict=True)],
    }
    point = ", ".join(f"{key} {value}" for key, value in first.point.items())
    print_table(console, f"{first.section}: {first.workload}, {point}, {first.bytes:,} bytes", columns, style="bold")


def print_answers(console: Console, answers: dict[str, list[str]]) -> None:
    """Print the questions with what the run says to them."""
    for question, lines in answers.items():
        console.print(f"\n{question}", style="bold")
        for line in lines:
            console.print(Padding(line, (0, 0, 0, 2)))


def print_targets(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print every target's figures, what they should be, and whether they are."""
    table = Table.grid(padding=(0, 1))
    words = {True: "met", False: "MISSED", None: ""}
    for verdict in verdicts:
        measured = "not measured" if verdict.measured is None else f"{verdict.measured:.2f}"
        text = f"{verdict.figure}: {measured} ({verdict.condition})"
        text += "".join(f"; {part}" for part in (verdict.at, verdict.limit) if part)
        table.add_row(verdict.target, words[verdict.met], text, style="red" if verdict.met is False else None)
    console.print("\ntargets", style="bold")
    console.print(table)
