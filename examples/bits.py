"""Digits from bits, without an embedding table and without a codec.

A row of eight pixels, black or white, is a position of eight bits, its halves two groups of four.
The model reads the bits and predicts each half; `confidence` reveals the most confident first.
"""

import torch
from sklearn.datasets import load_digits

import mdiff
from mdiff.backbones.bit_transformer import bit_transformer, signs

BITS, GROUPS, ROWS = 8, 2, 8
SPACE = mdiff.TokenSpace(16, mask_id=16)
WORTH = torch.tensor([8, 4, 2, 1])


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The canvases (1797, 16) of scikit-learn's digits, and their labels."""
    found = load_digits()
    black = torch.tensor(found.images > 7).reshape(-1, ROWS * GROUPS, BITS // GROUPS)
    return (black * WORTH).sum(2), torch.tensor(found.target)


def train(tokens: torch.Tensor, labels: torch.Tensor, steps: int) -> torch.nn.Module:
    """A model of the canvases given their labels."""
    torch.manual_seed(0)
    model = bit_transformer(
        grid=[ROWS, 1], bits=BITS, groups=GROUPS, classes=10, width=64, depth=2, heads=4,
        init_std=0.1,
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(tokens), (128,))
        loss = mdiff.masked_diffusion_loss(
            model, tokens[rows], space=SPACE, schedule=mdiff.Linear(),
            cond={"label": labels[rows]}, seed=step,
        )  # fmt: skip
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
    return model.eval()


def main() -> torch.Tensor:
    """Train, print one digit of each label, and return them as (10, 8, 8) of 0 and 1."""
    model, labels = train(*digits(), steps=200), torch.arange(10)
    canvas = torch.full((10, ROWS * GROUPS), SPACE.mask_id)
    drawn = mdiff.sample(
        model, canvas, space=SPACE, sampler="confidence", cond={"label": labels}, noise=1.0
    )
    black = (signs(drawn.tokens, BITS // GROUPS) > 0).view(10, ROWS, BITS).long()
    for row in range(ROWS):
        print("  ".join("".join(" █"[bit] for bit in digit[row]) for digit in black))
    return black


if __name__ == "__main__":
    main()
