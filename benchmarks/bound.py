"""The held-out bound of a text model, beside the n-grams and the autoregressive baseline.

    python benchmarks/bound.py MODEL TEXT [--draws 64]

The held-out tenth is the last tenth of the characters of TEXT, in windows side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from hashlib import sha256

from machine import RESULTS, record

from mdiff.evaluation.evaluate import evaluate
from mdiff.files.locate import locate
from mdiff.files.model_files import WEIGHTS
from mdiff.modalities.text.documents import Source, cut_documents
from mdiff.pipeline.loading import load


def baselines() -> dict[str, float]:
    """Bits per character of the other models, from their own recorded results."""
    found: dict[str, float] = {}
    ngrams, other = (RESULTS / f"{name}.json" for name in ("ngrams", "autoregressive"))
    if ngrams.exists():
        found.update(json.loads(ngrams.read_text())["figures"]["bits_per_char"])
    if other.exists():
        figures = json.loads(other.read_text())["figures"]
        label = f"autoregressive, same size, step {figures['best_step']} of {figures['steps']:,}"
        found[label] = figures["held_out_bits_per_char"]
    return found


def main() -> None:
    """Print and record the bound, with its error and the baselines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--draws", type=int, default=64)
    options = parser.parse_args()
    source = Source(options.text, holdout=0.1)
    documents = cut_documents(source.documents(), "holdout", holdout=0.1, validation=0.0)
    begun = time.perf_counter()
    found = evaluate(
        load(options.model),
        documents,
        draws=options.draws,
        progress=lambda done, total: print(f"\r{done}/{total} windows", end="", file=sys.stderr),
    )
    print(file=sys.stderr)
    weights = sha256((locate(options.model).folder / WEIGHTS[0]).read_bytes()).hexdigest()
    figures = {
        **found.as_dict(),
        "seconds": time.perf_counter() - begun,
        "model": options.model,
        "weights_sha256": weights,
    }
    value, error = found.bits_per("char")
    print(f"{'bound of ' + options.model:32} {value:.4f} +- {error:.4f} bits per character")
    for name, other in sorted(baselines().items(), key=lambda pair: pair[1]):
        print(f"{name:32} {other:.4f}")
    record("bound", figures)


if __name__ == "__main__":
    main()
