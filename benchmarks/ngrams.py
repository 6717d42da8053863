"""Kneser-Ney n-grams of characters: the baseline that a small text model has to beat.

    python benchmarks/ngrams.py TEXT [--orders 3 4 5 6 7 8]

The last tenth of the text is held out. Modified Kneser-Ney, interpolated, with three discounts
an order (Chen & Goodman 1999, section 3, eq. 26); the lowest order interpolates with uniform.
"""

from __future__ import annotations

import argparse
import gzip
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from machine import record


class Level(NamedTuple):
    """One order: counts of n-grams, of contexts, and the mass that each context sets aside."""

    counts: Counter[str]
    total: dict[str, int]
    spared: dict[str, float]
    discount: list[float]


class KneserNey:
    """P(c | context) for contexts of up to order - 1 characters."""

    def __init__(self, text: str, order: int) -> None:
        self.order = order
        self.alphabet = len(set(text))
        self.levels = []
        counts = Counter(text[i : i + order] for i in range(len(text) - order + 1))
        for length in range(order, 0, -1):
            self.levels.append(self._level(counts))
            # A shorter n-gram counts by how many different characters precede it.
            counts = Counter(gram[1:] for gram in counts) if length > 1 else counts
        self.levels.reverse()

    @staticmethod
    def _level(counts: Counter[str]) -> Level:
        total: dict[str, int] = defaultdict(int)
        spared: dict[str, float] = defaultdict(float)
        of = Counter(counts.values())
        share = of[1] / (of[1] + 2 * of[2]) if of[1] else 0.5
        estimated = [n - (n + 1) * share * of[n + 1] / of[n] if of[n] else 0.0 for n in (1, 2, 3)]
        # Among so few unigrams the estimate can leave the range in which it is a discount.
        discount = [0.0, *(d if 0 < d < n else 0.5 for n, d in enumerate(estimated, start=1))]
        for gram, count in counts.items():
            total[gram[:-1]] += count
            spared[gram[:-1]] += discount[min(count, 3)]
        return Level(counts, total, spared, discount)

    def probability(self, context: str, char: str) -> float:
        """P(char | the last order - 1 characters of context)."""
        p = 1 / self.alphabet
        for length, level in enumerate(self.levels):
            before = context[len(context) - length :]
            if len(before) < length or before not in level.total:
                break
            count = level.counts.get(before + char, 0)
            kept = count - level.discount[min(count, 3)]
            p = (kept + level.spared[before] * p) / level.total[before]
        return p

    def bits_per_char(self, text: str, start: int) -> float:
        """Mean of -log2 P over text[start:]."""
        reach = self.order - 1
        total = sum(
            math.log2(self.probability(text[max(0, i - reach) : i], text[i]))
            for i in range(start, len(text))
        )
        return -total / (len(text) - start)


def read(path: Path) -> str:
    """The text of a .txt or .gz file."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


def main() -> None:
    """Print and record bits per character of each order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--orders", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    options = parser.parse_args()
    text = read(options.text)
    cut = len(text) * 9 // 10
    figures = {}
    for order in options.orders:
        figures[f"{order}-gram"] = KneserNey(text[:cut], order).bits_per_char(text, cut)
        print(f"{order}-gram  {figures[f'{order}-gram']:.4f} bits per character", flush=True)
    record("ngrams", {"held_out_characters": len(text) - cut, "bits_per_char": figures})


if __name__ == "__main__":
    main()
