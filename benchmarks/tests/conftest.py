import pytest
import torch

from fill_benchmark import report, sections
from fill_benchmark.peers import CONTIGUOUS, GRAPH_REPLAY, SIX_COPIES, SLICED_FOREACH, UPDATE_AND_REPLAY


@pytest.fixture(scope="session")
def full_rows():
    """A row for every way of every point of a full run on a GPU, with made-up times."""
    times = {SIX_COPIES: 60.0, SLICED_FOREACH: 50.0, UPDATE_AND_REPLAY: 3.0, GRAPH_REPLAY: 2.0, CONTIGUOUS: 4.0}
    rows = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 40, 1 << 40))
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        for name, make in sections.SECTIONS.items():
            section = make(torch.device("meta"), quick=False)
            kernel = {"blocks": [1, 1, 1]} if name in sections.PROFILED else None
            metrics = ["host", "gpu"] if name in ("scale", "values", "rows") else section.metrics
            rows += [
                report.Row(name, metric, w.kind, w.point, w.case, w.bytes, way, 1, us := times.get(way, 5.0), us, us,
                           kernel, [us] * 3 if metric == "host" else None)
                for make_point in section.points
                for w in make_point()
                for metric in metrics
                for way in w.ways
            ]  # fmt: skip
    return rows
