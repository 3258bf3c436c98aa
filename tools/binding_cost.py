"""Measures what a call from Python to C++ costs, by how it is bound.

usage: python tools/binding_cost.py [--json FILE]

A method that takes six objects, once bound by pybind11 and once as a C function with CPython's fast calling convention;
both bodies are empty. Needs g++. Medians in us, less an empty loop's. It is why a plan's ``replay`` and a graph
copy's ``update`` are bound by the C API.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import record
from torch.utils.cpp_extension import include_paths

BATCHES, CALLS = 101, 20_000

SOURCE = """
#include <pybind11/pybind11.h>

namespace py = pybind11;

struct Bound {
  void call(const py::args& sources) const { asm volatile("" ::"r"(sources.ptr())); }
};

static PyObject* call(PyObject*, PyObject* const* sources, Py_ssize_t) {
  asm volatile("" ::"r"(sources));
  Py_RETURN_NONE;
}

static PyMethodDef method = {"call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&call)), METH_FASTCALL, ""};

PYBIND11_MODULE(bound, module) {
  py::class_<Bound>(module, "Bound").def(py::init<>()).def("call", &Bound::call);
  module.attr("call") = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    record.add_arguments(parser.add_argument)
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        module = build(Path(folder))
    ways: dict[str, Callable[..., None]] = {"pybind11": module.Bound().call, "METH_FASTCALL": module.call}
    costs = {name: median_us(way) for name, way in ways.items()}
    for name, cost in costs.items():
        print(f"{name:15} {cost:.3f} us")
    record.write(
        args,
        tool="binding_cost",
        what="calls of an empty body, timed",
        cases=len(ways) * BATCHES * CALLS,
        unit="calls",
        seconds=time.monotonic() - begin,
        faults=0,
        median_us=costs,
    )
    return 0


def build(folder: Path):  # type: ignore[no-untyped-def]  # the module's functions are not known to mypy
    source = folder / "bound.cpp"
    source.write_text(SOURCE)
    binary = source.with_suffix(".so")
    includes = [f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    subprocess.run(["g++", "-std=c++20", "-O2", "-fPIC", "-shared", *includes, source, "-o", binary], check=True)
    spec = importlib.util.spec_from_file_location("bound", binary)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def median_us(way: Callable[..., None]) -> float:
    objects = tuple(object() for _ in range(6))
    a, b, c, d, e, f = objects
    times = []
    for _ in range(BATCHES):
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            way(a, b, c, d, e, f)
        called = time.perf_counter_ns()
        for _ in range(CALLS):
            pass
        times.append((2 * called - start - time.perf_counter_ns()) / CALLS / 1e3)
    return round(statistics.median(times), 4)


if __name__ == "__main__":
    sys.exit(main())
