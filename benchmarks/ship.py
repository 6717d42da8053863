"""Put a trained model into the package: bfloat16 weights, manifest and card.

    python benchmarks/ship.py RUN NAME --recipe RECIPE.yaml --made "in 1 hour on two cores of ..."

RUN is a training run or one of its checkpoints. For a model of text one temperature is fitted on
the recipe's validation slice (Guo et al. 2017) and folded into the head: a model that was
trained on a small text for many epochs is overconfident. The card takes its figures from
benchmarks/results if they are of these very weights, so ship, run the benchmarks, and ship again:
the same run gives the same weights. What it says of the data is in CARDS below.
"""

from __future__ import annotations

import argparse
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bound import baselines
from machine import RESULTS

from mdiff import builtin
from mdiff.files.atomic import latest, staged
from mdiff.find import find
from mdiff.kernels import philox
from mdiff.objective.corruption import corrupt
from mdiff.pipeline.loading import load
from mdiff.training.recipe import load_recipe

CARDS = {
    "shakespeare": {
        "title": "A small masked-diffusion model of Shakespeare's plays",
        "data": "tiny Shakespeare: 1,115,394 characters of the plays, from "
        "data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn. The last tenth is held "
        "out; of the other nine tenths the last fiftieth was kept for choosing.",
        "licence": "The weights are Apache-2.0 like the package; the text is in the public domain.",
        "use": "Demonstrations, tests and experiments on two CPU cores. It writes verse that "
        "sounds right and means little; it knows nothing else.",
    },
    "fashion": {
        "title": "A small masked-diffusion model of clothes, by label",
        "data": "Fashion-MNIST (Xiao et al. 2017; github.com/zalandoresearch/fashion-mnist), the "
        "60,000 training pictures of 28 x 28 greys; the last 10,000 are held out, of the others "
        "the last fiftieth was kept for choosing. The codec saw the first 50,000.",
        "licence": "The weights are Apache-2.0 like the package; the data are MIT (Zalando SE).",
        "use": "Demonstrations, tests and experiments with guidance and samplers on two cores.",
    },
    "emoji": {
        "title": "A small masked-diffusion model of emoji and their names, either from the other",
        "data": "Noto emoji (github.com/googlefonts/noto-emoji, png/32): 3,583 pictures of 32 x 32 "
        "on white, with the Unicode names of their code points as captions; a tenth of the "
        "bases, with all their variants, is held out, from the codec too.",
        "licence": "The weights are Apache-2.0 like the package; so are the pictures (Google).",
        "use": "Demonstrations, tests and experiments with several parts of one canvas. It draws "
        "what looks like an emoji, often a variant of one in its data.",
    },
}
# The results that a card shows, and their keys with what they are called there.
SHOWN = {
    "fashion": {
        "label": "samples that a classifier gives the asked label",
        "diversity": "distance of two samples of a label, over that of two test pictures",
        "nearest": "distance to the nearest training picture, over that of test pictures",
        "frechet": "Frechet distance to the test set in the classifier's features",
    },
    "emoji": {
        "top_5_of_20": "held-out pictures with the right name in the best 5 of 20 (chance 0.25)",
        "top_1_of_20": "held-out pictures with the right name first of 20 (chance 0.05)",
    },
}


def baseline_lines() -> list[str]:
    """The other models' figures, best first."""
    others = sorted(baselines().items(), key=lambda pair: pair[1])
    return [f"| {name} | {value:.3f} |" for name, value in others]


def temperature_of(pipeline: Any, rows: Any, *, draws: int = 48) -> float:
    """The temperature of the logits at which the any-order bound of the rows is lowest.

    A grid of hundredths; every temperature is scored at the same hidden positions.
    """
    grid = [1 + step / 100 for step in range(-10, 41)]
    total = torch.zeros(len(grid), dtype=torch.float64)
    batch = rows.batch(torch.arange(len(rows)), torch.zeros(len(rows), dtype=torch.int64))
    whole = batch.tokens if batch.valid is None else batch.tokens[batch.valid.all(1)]
    length = whole.shape[1]
    with torch.inference_mode():
        for draw in range(draws):
            u = philox.uniform(0, 0, torch.arange(len(whole)), draw, purpose=philox.TIME)
            count = (u * length).long() + 1
            noisy = corrupt(
                whole, u, space=pipeline.space, schedule=pipeline.schedule, count=count,
                seed=int(philox.derive(0, draw)),
            )  # fmt: skip
            hidden = noisy == pipeline.space.mask_id
            logits = pipeline.denoiser(noisy, at=hidden).double()
            weight = (length / count)[:, None].expand_as(whole)[hidden]
            for index, temperature in enumerate(grid):
                nll = F.cross_entropy(logits / temperature, whole[hidden], reduction="none")
                total[index] += (weight * nll).sum()
    return grid[int(total.argmin())]


def card(
    name: str, run: Path, *, recipe_path: Path, made: str, weights: str, slice_sha256: str,
    temperature: float | None,
) -> str:  # fmt: skip
    """The README of the model, in Markdown."""
    about = CARDS[name]
    training = json.loads((run / "training.json").read_text())
    recipe = training["recipe"]
    lines = [
        f"# builtin:{name}",
        "",
        f"{about['title']}. Step {training['step']:,} of the recipe.",
        "",
        f"* **Data.** {about['data']} SHA-256 of the slice it was trained on: `{slice_sha256}`.",
        f"* **Licence.** {about['licence']}",
        f"* **Made by** `mdiff train {recipe_path}` {made} (torch "
        f"{training['versions']['torch'].partition('+')[0]}, precision "
        f"{recipe['train']['precision']}); the exponential average of the weights, "
        + (
            ""
            if temperature is None
            else f"the head divided by a temperature of {temperature:.2f} fitted on the "
            "validation slice by benchmarks/ship.py, "
        )
        + "stored in bfloat16.",
        f"* **For.** {about['use']}",
    ]
    lines += figures_of_pictures(name, weights)
    figures = figures_in("bound")
    if figures.get("weights_sha256") == weights:
        lines += [
            "",
            f"Held-out tenth, bits per character ({figures['draws']} draws of the any-order bound "
            f"in {figures['windows']} windows of {recipe['data']['length']} tokens; the others "
            "are likelihoods):",
            "",
            "| model | bits per character |",
            "|---|---|",
            f"| this one, upper bound | {figures['bits_per_char']:.3f} "
            f"± {figures['bits_per_char_stderr']:.3f} |",
            *baseline_lines(),
        ]
    return "\n".join(lines) + "\n"


def figures_in(name: str) -> dict[str, Any]:
    """The figures of a result, or none."""
    found = RESULTS / f"{name}.json"
    return json.loads(found.read_text())["figures"] if found.exists() else {}


def figures_of_pictures(name: str, weights: str) -> list[str]:
    """A table of the results that are of these weights."""
    columns: list[tuple[str, dict[str, Any]]] = []
    fashion, naming = figures_in("fashion_card"), figures_in("naming")
    if name == "fashion" and fashion.get("weights_sha256") == weights:
        columns = [
            (f"{row['series']}, {row['calls']:.0f} steps", row) for row in fashion["rows"]
        ] + [("real pictures", fashion["real"])]
    if name == "emoji" and naming.get("weights_sha256") == weights:
        columns = [(f"{naming['pictures']} pictures", naming)]
    if not columns:
        return []
    return [
        "",
        "| what | " + " | ".join(title for title, _ in columns) + " |",
        "|---|" + "---|" * len(columns),
        *(
            f"| {said} | " + " | ".join(f"{column[key]:.3f}" for _, column in columns) + " |"
            for key, said in SHOWN[name].items()
        ),
    ]


def main() -> None:
    """Write mdiff/builtin/NAME again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("name", choices=sorted(CARDS))
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--made", required=True, help="where and how long it trained")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    run = latest(options.run) or options.run
    recipe = load_recipe(options.recipe, options.overrides)
    modality = find("modalities", recipe.modality.name)(**recipe.modality.options)
    slices = {
        split: modality.examples(recipe.data.options, length=recipe.data.length, split=split)
        for split in (["train", "validation"] if modality.name == "text" else ["train"])
    }
    pipeline = load(str(run), dtype="float32", device="cpu")
    temperature = None
    if modality.name == "text":
        temperature = temperature_of(pipeline, slices["validation"])
        with torch.no_grad():
            pipeline.denoiser.head.weight.div_(temperature)
    pipeline.denoiser.bfloat16()
    target = Path(next(iter(builtin.__path__))) / options.name
    made, complete = (target.with_name(f"{options.name}.{part}") for part in ("parts", "whole"))
    for folder in (made, complete):
        shutil.rmtree(folder, ignore_errors=True)
    pipeline.save(made)
    weights = sha256((made / "model.safetensors").read_bytes()).hexdigest()
    with staged(complete) as folder:
        for file in made.iterdir():
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            elif file.name != "manifest.json":
                shutil.copy(file, folder)
        text = card(
            options.name, run, recipe_path=options.recipe, made=options.made, weights=weights,
            slice_sha256=slices["train"].slice_sha256, temperature=temperature,
        )  # fmt: skip
        (folder / "README.md").write_text(text)
    shutil.rmtree(made)
    shutil.rmtree(target, ignore_errors=True)
    complete.rename(target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size:,} bytes, temperature {temperature}")


if __name__ == "__main__":
    main()
