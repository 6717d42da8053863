"""`mdiff doctor`: what is installed, what runs where and why, and whether it is right."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from mdiff.cli.console import result, result_json

QUALITY_GATE = 7
PACKAGES = (
    "torch", "transformers", "tokenizers", "accelerate", "datasets", "safetensors", "triton",
    "numpy", "peft", "scipy",
)  # fmt: skip


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show versions, device and backends, and test the samplers against an exact law."""
    from mdiff.errors import BackendError
    from mdiff.selftest import check_samplers

    start = time.perf_counter()
    report = environment()
    try:
        checks = [vars(check) for check in check_samplers()]
    except BackendError as error:
        checks = [{"name": f"samplers: {error}", "p_value": None, "passed": False}]
    checks += backend_checks()
    report["checks"] = checks
    report["passed"] = all(check["passed"] for check in checks)
    report["seconds"] = round(time.perf_counter() - start, 2)
    if as_json:
        result_json(report)
    else:
        _table(report)
    if not report["passed"]:
        raise typer.Exit(QUALITY_GATE)


def environment() -> dict[str, Any]:
    """Versions, machine, device, threads and backends."""
    import torch

    import mdiff

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
        "backends": backends(),
    }


def backends() -> dict[str, str]:
    """Each backend of `draw` with why it runs or does not."""
    from mdiff.errors import BackendError
    from mdiff.ops import BACKENDS, backend_name

    found = dict.fromkeys(BACKENDS, "here, runs when asked for")
    asked = os.environ.get("MDIFF_BACKEND")
    try:
        why = "runs, as MDIFF_BACKEND says" if asked else "runs, as nothing else is asked for"
        found[backend_name()] = why
    except BackendError as error:
        found[str(asked)] = f"asked for by MDIFF_BACKEND, but {error}"
    return found


def backend_checks() -> list[dict[str, Any]]:
    """Each backend against the reference on one odd-shaped draw, ids and log-probabilities."""
    import torch

    from mdiff.ops import BACKENDS, draw

    logits = torch.randn(17, 2_050, generator=torch.Generator().manual_seed(0))
    truth = draw(logits, seed=1, backend="reference")
    checks = []
    for name in BACKENDS:
        if name != "reference":
            drawn = draw(logits, seed=1, backend=name)
            same = bool((drawn.tokens == truth.tokens).all())
            close = torch.allclose(
                drawn.log_prob.double(), truth.log_prob.double(), atol=1e-4, rtol=0
            )
            checks.append({"name": f"draw by {name}", "p_value": None, "passed": same and close})
    return checks


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _why_no_cuda(built: str | None) -> str:
    return "this torch is built without CUDA" if built is None else "torch sees no CUDA device"


def _table(report: dict[str, Any]) -> None:
    result(f"mdiff {report['mdiff']}, Python {report['python']}, {report['platform']}")
    shown = (f"{name} {found or 'missing'}" for name, found in report["packages"].items())
    result(", ".join(shown))
    result(f"device: {report['device']} ({report['why_device']})")
    result(f"threads: {report['threads']} of {report['cpus']} CPUs")
    for name, why in report["backends"].items():
        result(f"backend {name}: {why}")
    for check in report["checks"]:
        word = "ok  " if check["passed"] else "FAIL"
        p_value = "" if check["p_value"] is None else f"  p = {check['p_value']:.3g}"
        result(f"{word} {check['name']}{p_value}")
    verdict = "all is well" if report["passed"] else "something is wrong: see FAIL above"
    result(f"{verdict}, {report['seconds']} s")
    sys.stdout.flush()
