"""The command line in processes of its own: without a torch that fits, without the binary, into a closed pipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_copy
import fused_copy_cli
from fused_copy_cli import main

PACKAGES = [Path(module.__file__).parent for module in (fused_copy, fused_copy_cli)]
CONSOLE_SCRIPT = ("-c", "import sys; from fused_copy_cli import main; sys.exit(main())")
MODULE = ("-m", "fused_copy")


def start(*arguments: str, paths: tuple[Path, ...] = (), folder: Path = Path("/"), **options) -> subprocess.Popen:
    path = os.pathsep.join(map(str, [*paths, *filter(None, [os.environ.get("PYTHONPATH")])]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "80"}
    return subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, text=True, **options)


def run(*arguments: str, **options) -> tuple[int, str, str]:
    process = start(*arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def stand_in_torch(folder: Path, version: str) -> Path:
    module = folder / "torch" / "__init__.py"
    module.parent.mkdir()
    module.write_text(f"__version__ = {version!r}\n")
    return folder


@pytest.fixture
def torch_2_8(tmp_path) -> Path:
    return stand_in_torch(tmp_path, "2.8.0")


@pytest.fixture
def tree(tmp_path) -> Path:
    """The Python files of a clone that nothing was built in."""
    for package in PACKAGES:
        shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    return tmp_path


def test_torch_too_old(torch_2_8):
    wrong = f"fused_copy: needs torch 2.9 or newer: this is 2.8.0, {torch_2_8 / 'torch'}: pip install --upgrade torch"
    status, out, err = run(*CONSOLE_SCRIPT, "env", paths=(torch_2_8,))
    assert (status, err) == (1, "")
    facts = {line[:20].strip(): line[21:] for line in out.splitlines()}
    assert facts["torch"] == "2.8.0" and facts["binary"].startswith("not loaded, of _C.")
    assert facts["fused-copy"].startswith(f"{fused_copy.__version__}, ") and {"Python", "OS", "driver"} <= facts.keys()
    assert out.splitlines()[-1] == f"wrong: {wrong}"
    _, out, _ = run(*CONSOLE_SCRIPT, "env", "--json", paths=(torch_2_8,))
    assert json.loads(out)["wrong"] == [wrong]

    for command in ((), ("bench",)):
        assert run(*CONSOLE_SCRIPT, *command, paths=(torch_2_8,)) == (1, "", f"{wrong}\n")
    status, out, err = run(*MODULE, "env", paths=(torch_2_8,))
    assert status == 1 and wrong in err and "Traceback" not in err
    status, out, err = run("-c", "import fused_copy", paths=(torch_2_8,))
    assert err.splitlines()[-1] == f"ImportError: {wrong}"


def test_no_torch(tree):
    options = {"paths": (tree,)}
    without_packages = ("-S", *CONSOLE_SCRIPT)  # -S: no packages but those of PYTHONPATH
    wrong = f"fused_copy: needs torch 2.9 or newer: there is none for {sys.executable}: pip install torch"
    status, out, err = run(*without_packages, "env", **options)
    assert (status, err) == (1, "")
    assert f"{'torch':<20} not loaded" in out.splitlines()
    assert out.splitlines()[-1] == f"wrong: {wrong}"
    assert run(*without_packages, "--version", **options) == (0, f"fused-copy {fused_copy.__version__}\n", "")
    status, out, err = run(*without_packages, "--help", **options)
    assert (status, err) == (0, "") and out.startswith("usage: fused-copy ")
    status, _, err = run("-S", *MODULE, "env", **options)
    assert status == 1 and wrong in err and "Traceback" not in err

    (tree / "torch").mkdir()  # no module, but Python imports it
    for command in ((*without_packages, "env"), ("-S", *MODULE)):
        status, out, err = run(*command, **options)
        assert status == 1 and wrong in out + err and "Traceback" not in err


def test_a_clone_without_the_binary(tree):
    stand_in_torch(tree, "2.15.0")  # with -S, as an editable install of another clone would lend its binary
    status, out, err = run("-S", "-m", "fused_copy_cli", "env", folder=tree)
    assert (status, err) == (1, "")
    wrong = out.splitlines()[-1]
    assert wrong.startswith(f"wrong: fused_copy: {tree / 'fused_copy'} has no _C.c")
    assert "it belongs to a clone: pip install . there and run Python outside of it; " in wrong
    status, _, err = run("-S", *MODULE, "env", folder=tree)
    assert status == 1 and wrong.removeprefix("wrong: ") in err and "Traceback" not in err

    (tree / "setup.py").unlink()
    (tree / "fused_copy" / "_C.cpython-26-some-linux-gnu.so").touch()
    _, out, _ = run("-S", "-m", "fused_copy_cli", "env", folder=tree)
    assert f"{'binary':<20} not loaded, of _C.cpython-26-some-linux-gnu.so" in out.splitlines()
    assert out.splitlines()[-1].endswith("python -m pip install --force-reinstall --no-deps .")


def test_a_binary_that_does_not_load(tree):
    binary = tree / "fused_copy" / Path(fused_copy._library._C.__file__).name
    binary.write_bytes(b"no ELF")
    _, out, _ = run("-m", "fused_copy_cli", "env", folder=tree)
    wrong = out.splitlines()[-1]
    assert wrong.startswith(f"wrong: fused_copy: {binary} does not load beside torch ") and "too short" in wrong


def test_another_error_of_the_import(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_COPY_BACKEND", "nonsense")
    status, out, err = run(*CONSOLE_SCRIPT, "env")
    assert (status, err) == (1, "")
    assert out.splitlines()[-1].startswith("wrong: import fused_copy: ValueError: fused_copy: backend is 'nonsense'")


@pytest.mark.parametrize(
    "command",
    [("--help",), ("env",), ("env", "--json"), ("--device=cpu", "--steps=4"), ("bench", "--quick")],
    ids=" ".join,
)
def test_nobody_reads_on(command):
    read, write = os.pipe()
    os.close(read)
    process = start(*CONSOLE_SCRIPT, *command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate(timeout=300)[1] == ""
    assert process.returncode == 1 or command == ("--help",)  # which argparse prints and some versions let pass


def test_nobody_opened_a_standard_output():
    program = [sys.executable, *CONSOLE_SCRIPT, "env"]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *program], stderr=subprocess.PIPE, text=True, timeout=300
    )
    assert (closed.returncode, closed.stderr) == (subprocess.run(program, capture_output=True).returncode, "")


def test_a_torch_without_numpy_does_not_warn(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(name='numpy')\n")
    for command in (("env",), ("--device=cpu", "--steps=4")):
        _, _, err = run(*CONSOLE_SCRIPT, *command, paths=(tmp_path,))
        assert err == ""


@pytest.mark.parametrize("options", [["--steps", "3"], ["--device", "cpu"], ["--json", "x.json"]], ids=" ".join)
def test_options_are_not_ignored(options, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*options, "bench"])
    assert exit.value.code == 2
    assert "options before bench" in capsys.readouterr().err


def test_public_names():
    assert dir(fused_copy) == sorted(fused_copy.__all__)
    with pytest.raises(AttributeError, match="module 'fused_copy' has no attribute 'nonsense'"):
        _ = fused_copy.nonsense
