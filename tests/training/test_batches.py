"""The rows of a step: every row once an epoch, whatever the size of a batch."""

from __future__ import annotations

from itertools import pairwise

import torch

from mdiff.training.batches import epoch_order, rows_of_step


def test_each_row_is_read_once_an_epoch_and_steps_join_epochs_without_a_gap():
    read = [rows_of_step(step, batch_size=8, rows=20, seed=3) for step in range(1, 11)]
    rows = torch.cat([row for row, _ in read])
    epochs = torch.cat([epoch for _, epoch in read])
    assert epochs.tolist() == [i // 20 for i in range(80)]
    orders = [rows[epochs == epoch] for epoch in range(4)]
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert all(not torch.equal(a, b) for a, b in pairwise(orders))
    assert not torch.equal(epoch_order(20, epoch=0, seed=3), epoch_order(20, epoch=0, seed=4))
