"""Which backend runs an operation: those that are here, and the choice among them."""

import os
from collections.abc import Callable

from mdiff.errors import BackendError, nearest
from mdiff.kernels.draw_c import LIBRARY, WHY_NOT, draw_c
from mdiff.kernels.draw_torch import draw_torch
from mdiff.kernels.draw_triton import why_not as triton_why_not
from mdiff.kernels.reference import Draw, draw_reference

# The draws that run on the CPU here, and the others with why they do not. triton runs on
# CUDA; on the CPU only in its interpreter, when it is asked for.
BACKENDS: dict[str, Callable[..., Draw]] = {"reference": draw_reference, "torch": draw_torch}
MISSING: dict[str, str] = {}
if LIBRARY is None:
    MISSING["c"] = WHY_NOT
else:
    BACKENDS["c"] = draw_c


def backend_name(name: str | None = None, *, device: str = "cpu") -> str:
    """The backend for a type of device: the argument, else MDIFF_BACKEND, else its default.

    The default is c on the CPU and triton on CUDA, where they are here, else torch. One that is
    asked for and missing, or that does not run there, is a BackendError, never a silent other.
    """
    chosen = name or os.environ.get("MDIFF_BACKEND")
    if not chosen:
        if device == "cuda":
            return "torch" if triton_why_not(device) else "triton"
        return "c" if device == "cpu" and "c" in BACKENDS else "torch"
    if chosen == "triton":
        why = triton_why_not(device)
        if why:
            raise BackendError(f"backend 'triton' is not here: {why}")
        return chosen
    if chosen in MISSING:
        raise BackendError(f"backend {chosen!r} is not here: {MISSING[chosen]}")
    if chosen not in BACKENDS:
        known = [*BACKENDS, "triton"]
        raise BackendError(f"backend {chosen!r} is not here; {nearest(chosen, known)}")
    if chosen == "c" and device != "cpu":
        raise BackendError(f"backend 'c' runs on the CPU; the logits are on {device}")
    return chosen
