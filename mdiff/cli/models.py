"""`mdiff models`: published models that open here; and whether one fits this machine."""

from __future__ import annotations

from mdiff.cli.options import OneObject
from mdiff.cli.views.console import result, result_json

GIGABYTE = 10**9
# Of the memory that is free: what is left for the canvas and the activations.
FOR_WEIGHTS = 0.9


def models(as_json: OneObject = False) -> None:
    """Show published models that open here: sizes, memory of the weights, and what was compared."""
    from mdiff.files import catalogue

    if as_json:
        result_json({"families": [
            {**entry._asdict(), "models": [
                {"name": name, "parameters": size, "bytes": needs(size)}
                for name, size in entry.models.items()
            ]}
            for entry in catalogue()
        ]})  # fmt: skip
        return
    for entry in catalogue():
        result(f"{entry.family} ({entry.medium})" + (f"  {entry.flags}" * bool(entry.flags)))
        for name, size in entry.models.items():
            result(f"  {name:<40} {_memory(size)}")
    result(
        "Each family was compared with outputs of its official code or of transformers, on small "
        "weights: docs/checkpoints.md. mdiff inspect NAME --fits: whether it fits this machine."
    )


def _memory(size: int | None) -> str:
    each = ", ".join(f"{kind} {count / GIGABYTE:.1f} GB" for kind, count in needs(size).items())
    return f"{size / GIGABYTE:.1f} billion: {each}" if size else "size not stated by its name"


def needs(size: int | None) -> dict[str, int]:
    """The bytes of so many weights, by their type; of an unknown number, nothing."""
    from mdiff.files import WIDTHS

    return {kind: size * width for kind, width in WIDTHS.items()} if size else {}


def fits(name: str, as_json: bool) -> None:
    """Print whether the weights of a model fit the memory that is free, by type and device."""
    from accelerate.utils import get_max_memory

    from mdiff.files import parameters_of

    size, source = parameters_of(name)
    free = {str(device): count for device, count in get_max_memory().items()}
    found = {
        kind: {device: count <= FOR_WEIGHTS * memory for device, memory in free.items()}
        for kind, count in needs(size).items()
    }
    if as_json:
        result_json({
            "model": name, "parameters": size, "source": source, "bytes": needs(size),
            "free": free, "fits": found,
        })  # fmt: skip
        return
    result(f"{name}: {size:,} parameters, by {source}")
    for kind, count in needs(size).items():
        for device, fit in found[kind].items():
            where = "memory" if device == "cpu" else f"GPU {device}"
            result(
                f"{kind:<9} {count / GIGABYTE:>8.2f} GB  {'fits' if fit else 'does not fit'} "
                f"{where}, of which {free[device] / GIGABYTE:.1f} GB are free"
            )
