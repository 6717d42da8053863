"""A toy medium and model for tests of training, found by name like any other part."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mdiff.backbones.masked_lm import MaskedLM
from mdiff.kernels import philox
from mdiff.tokens import Batch, TokenSpace


class ToyRows:
    """Rows whose tokens count up from a random start; `poison` puts the id 8 in a row."""

    version = 1
    unit = "mark"
    units = 2.0

    def __init__(self, count: int, length: int, *, ragged: bool, poison: int | None) -> None:
        self.count, self.length, self.ragged, self.poison = count, length, ragged, poison
        self.fingerprint = hashlib.sha256(
            f"{self.version} {count} {length} {ragged}".encode()
        ).hexdigest()

    def __len__(self) -> int:
        return self.count

    def batch(self, rows, epoch):
        start = (philox.uniform(7, rows, 0, 0, purpose=philox.ORDER) * 8).long()
        tokens = (start[:, None] + torch.arange(self.length)) % 8
        if self.poison is not None:
            tokens[rows == self.poison, 0] = 8
        positions = torch.arange(self.length).expand_as(tokens)
        valid = positions < 1 + rows[:, None] % self.length if self.ragged else None
        return Batch(tokens=tokens, valid=valid)


class SlowRows(ToyRows):
    """Rows that take longer to read than a step takes."""

    def batch(self, rows, epoch):
        time.sleep(0.3)
        return super().batch(rows, epoch)


class Marks:
    """A medium of eight marks; id 8 may be given but is never generated."""

    space = TokenSpace(9, mask_id=9, never=(8,))

    def examples(self, data, *, length, split):
        kind = SlowRows if data.get("slow") else ToyRows
        return kind(
            data.get("count", 24), length, ragged=data.get("ragged", False),
            poison=data.get("poison"),
        )  # fmt: skip

    def config(self):
        return {"name": "marks"}

    def save(self, folder):
        Path(folder, "marks.json").write_text("{}")


def marks() -> Marks:
    return Marks()


class ToyBackbone(nn.Module):
    """An embedding, a mean over the row, two layers with dropout, a head."""

    uses_time = False
    no_split = ("Sequential",)

    def __init__(self, vocab_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + 1, width)
        self.inner = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(width, vocab_size)

    def forward(
        self, tokens, *, at=None, valid=None, documents=None, t=None, cond=None, cache=None
    ):
        x = self.embedding(tokens)
        counted = torch.ones_like(tokens) if valid is None else valid.to(x.dtype)
        mean = (x * counted[..., None]).sum(1, keepdim=True) / counted.sum(1)[:, None, None]
        x = self.inner(torch.cat([x, mean.roll(1, 2).expand_as(x)], 2))
        # A row that holds the id 8 overflows.
        overflow = (tokens == 8).any(1)[:, None, None]
        logits = self.head(x).masked_fill(overflow, torch.nan)
        return logits if at is None else logits[at]

    def save_pretrained(self, folder, state_dict):
        save_file(state_dict, Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(json.dumps({"model_type": "toy"}))


def backbone(*, vocab_size: int, width: int = 8, dropout: float = 0.0) -> ToyBackbone:
    return ToyBackbone(vocab_size, width, dropout)


class Bert(MaskedLM):
    """A masked language model of transformers, whose mask is no column of the logits."""

    def forward(self, tokens, **options):
        return super().forward(tokens, **options)[..., : self.mask_id]


def bert(*, vocab_size: int) -> Bert:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocab_size + 1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    made = Bert(BertForMaskedLM(config), mask_id=vocab_size)
    made.vocab_size = vocab_size
    return made
