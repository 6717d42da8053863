"""Compile the Triton kernels for an H100 or H200, sm_90, without one: prints their PTX as JSON.

    python tests/support/compiled.py [FORM...]

Run by tests/kernels/test_draw_triton.py in a process of its own, where Triton does not interpret.
"""

from __future__ import annotations

import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdiff.kernels.gpu.draw import draw_kernel
from mdiff.kernels.gpu.loss import loss_kernel
from mdiff.kernels.gpu.reveal import reveal_kernel

TYPES = {
    "scale": "*fp64", "span": "*i64", "next_id": "*i32", "holds_forbidden": "*i32",
    "seed": "*i64", "position": "*i64", "sample": "*i64", "step": "*i64", "tokens": "*i64",
    "figures": "*fp32", "scratch": "*fp32", "maxima": "*fp32", "listed": "*i32",
    "value": "*fp32", "column": "*i32", "levels": "*fp32", "slope": "fp32", "heat": "fp32",
    "top_p": "fp32", "left_out": "fp32", "tail": "fp32", "floor": "fp32",
    "requested": "*i1", "drawn": "*i64", "drawn_log_prob": "*fp32", "drawn_entropy": "*fp32",
    "score": "*fp32", "count": "*i64", "out_tokens": "*i64", "out_at": "*i1",
    "out_log_prob": "*fp32", "out_entropy": "*fp32", "threshold_bits": "i64",
    "target": "*i64", "weight": "*fp32", "found": "*fp32", "smoothing": "fp32",
}  # fmt: skip
PLAIN = {
    "READ": True, "FINISH": True, "GREEDY": False, "DRAWN": False, "TWO_LAWS": False,
    "TOP_K": False, "TOP_P": False, "MIN_P": False, "TILES": 128, "PIECES": 8, "TILE": 1024,
    "GROUP": 4, "QUEUE": 8, "SAMPLE": 1024, "STAGES": 3,
}  # fmt: skip
FILTERS = {"TOP_K": True, "TOP_P": True, "MIN_P": True, "TWO_LAWS": True, "GROUP": 2}
LOSS = {"DIFFERENTIATE": True, "SMOOTHED": False, "BLOCK": 4096}
LISTS = ("maxima", "listed", "value", "column")
OPTIONAL = ("unconditional", "scale", "span", "next_id", "holds_forbidden")


def ptx(kernel, kind, constants, warps):
    """The PTX of one form of a kernel; a constant None is an argument that is left out."""
    types = {**TYPES, "logits": f"*{kind}", "unconditional": f"*{kind}"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in ("logits", "stride", "unconditional", "other_stride")
        if name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def main():
    """Print {name: PTX} of the draw, the loss and the reveal in all forms, or in those named."""
    alone = dict.fromkeys(OPTIONAL)
    plain = {**PLAIN, **alone, **dict.fromkeys((*LISTS, "levels"))}
    forms = {
        "plain bf16": (draw_kernel, "bf16", plain, 4),
        "top_p bf16": (draw_kernel, "bf16", {**PLAIN, **alone, "TOP_P": True}, 8),
        "every option fp32": (draw_kernel, "fp32", {**PLAIN, **FILTERS, "levels": None}, 8),
        "loss bf16": (loss_kernel, "bf16", {**LOSS, "span": None, "next_id": None}, 8),
        "loss, every option fp32": (loss_kernel, "fp32", {**LOSS, "SMOOTHED": True}, 8),
        "reveal": (reveal_kernel, "fp32", {"POSITIONS": 1024, "BY_THRESHOLD": True}, 8),
    }
    print(json.dumps({name: ptx(*forms[name]) for name in sys.argv[1:] or forms}))


if __name__ == "__main__":
    main()
