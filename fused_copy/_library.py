"""Loads the binary, which registers ``torch.ops.fused_copy.replay``."""

import torch  # the binary resolves its symbols when it is loaded

try:
    from fused_copy import _C
except ImportError as error:
    raise ImportError(
        "fused_copy: the compiled module is missing or does not load beside torch "
        f"{torch.__version__} ({error}). Install the package (pip install . in a clone) and import it from outside the "
        "clone, whose own fused_copy folder has a binary only after an editable install."
    ) from error

_C.look_up_torch()

missing: list[str] = _C.missing()
"""What this torch lacks without which calls are slower or something is not refused, in words."""

__all__ = ["_C", "missing"]
