"""Put a trained model into the package: bfloat16 weights, manifest and card.

    python benchmarks/ship.py RUN NAME --recipe RECIPE.yaml --hours H [--text TEXT]

RUN is a training run or one of its checkpoints. The card takes its figures from
benchmarks/results/bound.json where there are any, so ship, run bound.py, and ship again: the
weights are the same bytes. What it says of the data is in CARDS below.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from machine import RESULTS, machine

from mdiff import builtin
from mdiff.checkpoint import latest, staged
from mdiff.config import load_recipe
from mdiff.find import find
from mdiff.pipeline import load

CARDS = {
    "shakespeare": {
        "title": "a small masked-diffusion model of Shakespeare's plays",
        "data": "tiny Shakespeare: 1,115,394 characters of the plays, from "
        "data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn. The last tenth is held "
        "out; of the other nine tenths the last fiftieth was kept for choosing.",
        "licence": "The weights are Apache-2.0 like the package; the text is in the public domain.",
        "use": "Demonstrations, tests and experiments on two CPU cores. It writes verse that "
        "sounds right and means little; it knows nothing else.",
    },
}


def baseline_lines(figures: dict[str, Any]) -> list[str]:
    """The other models' figures, best first."""
    others = sorted(figures["baselines_bits_per_char"].items(), key=lambda pair: pair[1])
    return [f"| {name} | {value:.3f} |" for name, value in others]


def card(name: str, run: Path, recipe_path: Path, hours: float, overrides: list[str]) -> str:
    """The README of the model, in Markdown."""
    about, where = CARDS[name], machine()
    recipe = load_recipe(recipe_path, overrides)
    modality = find("modalities", recipe.modality.name)(**recipe.modality.options)
    rows = modality.examples(recipe.data.options, length=recipe.data.length, split="train")
    step = json.loads((run / "training.json").read_text())["step"]
    lines = [
        f"# builtin:{name}",
        "",
        f"{about['title'][:1].upper()}{about['title'][1:]}. Step {step:,} of the recipe.",
        "",
        f"* **Data.** {about['data']} SHA-256 of the slice it was trained on: "
        f"`{rows.slice_sha256}`.",
        f"* **Licence.** {about['licence']}",
        f"* **Made by** `mdiff train {recipe_path}`, in {hours:.1f} hours on two cores of an "
        f"{where['cpu']} (torch {where['torch'].partition('+')[0]}, two threads, bfloat16 "
        "matrices), exponential average of the weights, stored in bfloat16.",
        f"* **For.** {about['use']}",
    ]
    found = RESULTS / "bound.json"
    if found.exists():
        figures = json.loads(found.read_text())["figures"]
        lines += [
            "",
            f"Held-out tenth, bits per character ({figures['draws']} draws of the any-order bound "
            f"in {figures['windows']} windows of {recipe.data.length} tokens; the others are "
            "likelihoods):",
            "",
            "| model | bits per character |",
            "|---|---|",
            f"| this one, upper bound | {figures['bits_per_char']:.3f} "
            f"± {figures['bits_per_char_stderr']:.3f} |",
            *baseline_lines(figures),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write mdiff/builtin/NAME anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", choices=sorted(CARDS))
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    run = latest(options.run) or options.run
    text = card(options.name, run, options.recipe, options.hours, options.overrides)
    pipeline = load(str(run), dtype="bfloat16", device="cpu")
    target = Path(next(iter(builtin.__path__))) / options.name
    made = target.with_name(options.name + ".new")
    shutil.rmtree(made, ignore_errors=True)
    pipeline.save(made)
    with staged(target.with_name(options.name + ".card")) as folder:
        for file in made.iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, folder)
        (folder / "README.md").write_text(text)
    shutil.rmtree(made)
    shutil.rmtree(target, ignore_errors=True)
    target.with_name(options.name + ".card").rename(target)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
