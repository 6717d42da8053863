"""Documents of tokens cut into rows of one length, each row a function of (row, epoch)."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mdiff.errors import ConfigError, DataError
from mdiff.kernels import philox
from mdiff.tokens import Batch


class PackedRows:
    """Rows of `length` tokens cut from the documents laid end to end; an `Examples`.

    With `shift` (training) an epoch starts its cuts at an offset of its own, so that windows
    differ between epochs; a remainder shorter than two rows is left out of each epoch, another
    one each time. Without (evaluation) the rows lie side by side from the first token to the
    last, and the last row is padded.

    `documents` ids keep packed documents apart; a source that is one document has none.
    `fingerprint` is SHA-256 over tokens, document starts, length and manner of cutting.
    `slice_sha256` is that of the text which was tokenised, for a model's card.
    """

    def __init__(
        self, documents: Sequence[Sequence[int]], *, length: int, shift: bool, unit: str,
        units: float, slice_sha256: str = "",
    ) -> None:  # fmt: skip
        if length < 1:
            raise ConfigError(f"length={length}: need at least 1")
        documents = [document for document in documents if len(document)]
        if not documents:
            raise DataError("the data holds no token")
        sizes = torch.tensor([len(document) for document in documents], dtype=torch.int64)
        self.tokens = torch.cat([torch.tensor(each, dtype=torch.int32) for each in documents])
        self.length, self.shift, self.unit, self.units = length, shift, unit, units
        self.slice_sha256 = slice_sha256
        self.starts = sizes.cumsum(0) - sizes
        digest = hashlib.sha256(f"rows of {length}, shift {shift};".encode())
        for tensor in (self.tokens, self.starts):
            digest.update(tensor.numpy().astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        """How many rows an epoch has, at least 1."""
        total, length = len(self.tokens), self.length
        return max(1, (total - length + 1) // length) if self.shift else -(-total // length)

    def offset(self, epoch: Tensor) -> Tensor:
        """Where the first row of each epoch (B,) starts: uniform over the slack, (B,) int64."""
        if not self.shift:
            return torch.zeros_like(epoch)
        slack = max(0, len(self.tokens) - len(self) * self.length)
        share = philox.uniform(0, epoch, 0, 0, purpose=philox.SHUFFLE)
        return (share * (slack + 1)).to(torch.int64)

    def batch(self, rows: Tensor, epoch: Tensor) -> Batch:
        """Rows `rows` (B,) int64 of epochs `epoch` (B,) int64, as (B, length)."""
        positions = (rows * self.length + self.offset(epoch))[:, None] + torch.arange(self.length)
        valid = positions < len(self.tokens)
        positions = positions.clamp(max=len(self.tokens) - 1)
        documents = None
        if len(self.starts) > 1:
            documents = torch.searchsorted(self.starts, positions, right=True) - 1
        # Whether padding is reported depends on the data set, not on which rows were asked for.
        padded = len(self) * self.length > len(self.tokens)
        tokens = self.tokens[positions].to(torch.int64)
        return Batch(tokens, valid=valid if padded else None, documents=documents)
