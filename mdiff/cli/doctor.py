"""`mdiff doctor`: versions, devices and backends, and checks of their results."""

import os
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from mdiff.cli.options import OneObject
from mdiff.cli.threads import usable_cpus
from mdiff.cli.views.console import result, result_json

QUALITY_GATE = 7
PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "triton",
    "numpy", "Pillow", "scikit-learn", "vector-quantize-pytorch", "peft", "scipy", "torchmetrics",
)  # fmt: skip


def doctor(as_json: OneObject = False) -> None:
    """Show versions, device and backends, and test the samplers against an exact law."""
    from mdiff.errors import BackendError
    from mdiff.evaluation import check_samplers, reveal_rates

    start = time.perf_counter()
    report = environment()
    try:
        checks: list[dict[str, object]] = [vars(check) for check in check_samplers()]
    except BackendError as error:
        checks = [{"name": f"samplers: {error}", "p_value": None, "passed": False}]
    checks += backend_checks() + picture_checks()
    report["checks"], report["reveal_rate"] = checks, reveal_rates()
    report["passed"] = all(check["passed"] for check in checks)
    report["seconds"] = round(time.perf_counter() - start, 2)
    if as_json:
        result_json(report)
    else:
        _table(report)
    if not report["passed"]:
        raise typer.Exit(QUALITY_GATE)


def environment() -> dict[str, object]:
    """Versions, machine, device, threads and backends."""
    import torch

    import mdiff
    from mdiff.files import BUILTIN, builtin_models

    cuda = torch.cuda.is_available()
    return {
        "mdiff": mdiff.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "why_device": "CUDA is available" if cuda else _why_no_cuda(torch.version.cuda),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cpus(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "backends": backends(),
        "models": sorted(BUILTIN + name for name in builtin_models()),
    }


def backends() -> dict[str, str]:
    """Each backend of `draw` with why it runs or does not."""
    import torch

    from mdiff.errors import BackendError
    from mdiff.kernels.draw_triton import why_not as triton_why_not
    from mdiff.ops import BACKENDS, MISSING, backend_name

    found = dict.fromkeys(BACKENDS, "here, runs when asked for")
    found |= {name: f"missing: {why}" for name, why in MISSING.items()}
    why = triton_why_not("cuda" if torch.cuda.is_available() else "cpu")
    found["triton"] = f"missing: {why}" if why else "here, runs when asked for"
    if torch.cuda.is_available() and not why:
        found["triton"] = "runs on CUDA"
    asked = os.environ.get("MDIFF_BACKEND")
    try:
        chosen = backend_name()
    except BackendError as error:
        found[str(asked)] = f"asked for by MDIFF_BACKEND, but {error}"
        return found
    if asked:
        found[chosen] = "runs, as MDIFF_BACKEND says"
    elif chosen == "c":
        found["torch"] = "runs where neither c nor triton does"
        found["c"] = "runs on the CPU, as its library is built"
    else:
        found[chosen] = "runs, as c is missing"
    if chosen == "c":
        found["c"] += "; hands float64 logits over to torch"
    return found


def backend_checks() -> list[dict[str, object]]:
    """Each backend against the reference on one odd-shaped draw, ids and log-probabilities."""
    import torch

    from mdiff.ops import BACKENDS, draw

    logits = torch.randn(17, 2_050, generator=torch.Generator().manual_seed(0))
    truth = draw(logits, seed=1, backend="reference")
    checks: list[dict[str, object]] = []
    for name in BACKENDS:
        if name != "reference":
            drawn = draw(logits, seed=1, backend=name)
            same = bool((drawn.tokens == truth.tokens).all())
            close = torch.allclose(
                drawn.log_prob.double(), truth.log_prob.double(), atol=1e-4, rtol=0
            )
            checks.append({"name": f"draw by {name}", "p_value": None, "passed": same and close})
    return checks


def picture_checks() -> list[dict[str, object]]:
    """A lossless codec on every pixel value, an edit outside its mask, an order on a grid."""
    import torch

    from mdiff.modalities.image import box_mask, pasted
    from mdiff.modalities.image.codecs.levels import levels
    from mdiff.samplers.halton import halton_order

    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    codec = levels(channels=1)
    mask = box_mask("3:9,2:15", (16, 16))
    made = pasted(every[0], 255 - every, mask)
    positions = halton_order((7, 9)).sort().values
    found = {
        "codec levels gives every value back": torch.equal(
            codec.decode(codec.encode(every)), every
        ),
        "an edit keeps what is outside its mask": torch.equal(made == every, ~mask[None, None]),
        "halton covers a grid once": torch.equal(positions, torch.arange(7 * 9)),
    }
    return [{"name": name, "p_value": None, "passed": good} for name, good in found.items()]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _why_no_cuda(built: str | None) -> str:
    return "this torch is built without CUDA" if built is None else "torch finds no CUDA device"


def _table(report: Mapping[str, Any]) -> None:
    result(f"mdiff {report['mdiff']}, Python {report['python']}, {report['platform']}")
    shown = (f"{name} {found or 'missing'}" for name, found in report["packages"].items())
    result(", ".join(shown))
    result(f"device: {report['device']} ({report['why_device']})")
    usable, waiting = report["usable_cpus"], report["wait_policy"] or "as OpenMP decides"
    result(f"threads: {report['threads']} of {usable} usable CPUs, waiting: {waiting.lower()}")
    for name, why in report["backends"].items():
        result(f"backend {name}: {why}")
    result(f"models: {', '.join(report['models'])}")
    for check in report["checks"]:
        word = "ok  " if check["passed"] else "FAIL"
        p_value = "" if check["p_value"] is None else f"  p = {check['p_value']:.3g}"
        result(f"{word} {check['name']}{p_value}")
    rate = report["reveal_rate"]
    result(
        f"float32: one draw over {rate['vocab']:,} ids and the mask reveals "
        f"{rate['joint_categorical']:.3f} of what a step of {rate['steps']:,} should, as the noise "
        f"is cut off; ours, where the mask is no class, {rate['ours']:.6f}"
    )
    verdict = "all is well" if report["passed"] else "something is wrong: see FAIL above"
    result(f"{verdict}, {report['seconds']} s")
