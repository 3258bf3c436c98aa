"""Loads the binary, which registers ``torch.ops.fused_copy.replay``, or says what it lacks."""

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

OLDEST_TORCH = (2, 9)
NEEDS_TORCH = "needs torch {}.{} or newer".format(*OLDEST_TORCH)


def _import_error(text: str) -> ImportError:
    # By this name `python -m fused_copy` knows that its package is what failed: it prints the text and no traceback.
    return ImportError(f"fused_copy: {text}", name="fused_copy")


def _why_missing() -> str:
    folder = Path(__file__).parent
    missing = f"{folder} has no _C{EXTENSION_SUFFIXES[0]}, the compiled module for this Python ({sys.executable})"
    if (folder.parent / "setup.py").exists():
        return (
            f"{missing}, as it belongs to a clone: pip install . there and run Python outside of it; "
            "or have it built into the clone: pip install --no-build-isolation -e ."
        )
    return f"{missing}: with that Python, in a clone: python -m pip install --force-reinstall --no-deps ."


try:
    import torch  # the binary resolves its symbols when it is loaded

    if not hasattr(torch, "__version__"):  # a folder of that name is taken for a package
        raise ModuleNotFoundError(f"{torch} is no module", name="torch")
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise _import_error(f"{NEEDS_TORCH}: there is none for {sys.executable}: pip install torch") from error

if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    raise _import_error(
        f"{NEEDS_TORCH}: this is {torch.__version__}, {Path(torch.__file__).parent}: pip install --upgrade torch"
    )

try:
    from fused_copy import _C
except ImportError as error:
    binary = Path(__file__).with_name(f"_C{EXTENSION_SUFFIXES[0]}")
    raise _import_error(
        f"{binary} does not load beside torch {torch.__version__}: {error}. If it was built here, build it again; "
        "else install it again, or report it with what `fused-copy env` prints"
        if binary.exists()
        else _why_missing()
    ) from error

_C.look_up_torch()

missing: list[str] = _C.missing()
"""What this torch lacks without which calls are slower or something is not refused, in words."""

__all__ = ["_C", "missing"]
