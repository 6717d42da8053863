"""How learned codecs are trained: reconstruct pictures through a quantiser."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from mdiff.errors import ConfigError, nearest
from mdiff.kernels import philox
from mdiff.modalities.image.codec import Report
from mdiff.modalities.image.codecs.networks.autoencoder import ResidualBlock

REPORT_EVERY = 50


@dataclass(frozen=True)
class Training:
    """The numbers of a codec's training.

    `edges` weighs the error of the differences between neighbouring pixels, which keeps lines
    sharp; `commitment` and `decay` are the quantiser's; codes used less than `revive_below`
    times a batch on the moving average are replaced. The rate `lr` falls to 0 along a cosine.
    """

    steps: int = 2000
    batch_size: int = 64
    lr: float = 2e-3
    edges: float = 0.5
    commitment: float = 0.25
    decay: float = 0.99
    revive_below: float = 1.0

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Training:
        """From options; ConfigError for one that is unknown, or outside its `BOUNDS`."""
        known = [field.name for field in fields(cls)]
        given: dict[str, Any] = dict(options)
        for name, value in given.items():
            if name not in known:
                raise ConfigError(f"unknown codec option {name!r}; {nearest(name, known)}")
            least, most = BOUNDS[name]
            whole = type(least) is int
            if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
                kind = "a whole number" if whole else "a number"
                raise ConfigError(f"codec.{name}={value!r}: expected {kind}, {least} to {most}")
        return cls(**given)

    def check_finite(self, values: Tensor, when: str) -> None:
        """Raise ConfigError, naming the rate, where training has diverged."""
        if not bool(values.isfinite().all()):
            raise ConfigError(
                f"codec.lr={self.lr}: training diverged: values that are not finite after {when}; "
                f"try a smaller rate, such as {PLAIN['lr']}"
            )

    def rate(self, step: int) -> float:
        """The share of `lr` at step 0, 1, ...: up over a twentieth of the steps, then a cosine."""
        rise = max(1.0, self.steps / 20)
        return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / self.steps)) / 2

    def changed(self) -> dict[str, object]:
        """The numbers that are not the defaults."""
        return {name: value for name, value in asdict(self).items() if value != PLAIN[name]}


PLAIN = asdict(Training())
# The least and the most of each number, whole where its least is.
BOUNDS: dict[str, tuple[float, float]] = {
    "steps": (1, 10**9), "batch_size": (1, 10**6), "lr": (1e-12, 1e38), "edges": (0.0, 1e6),
    "commitment": (0.0, 1e6), "decay": (0.0, 1.0), "revive_below": (0.0, 1e6),
}  # fmt: skip


def fit_networks(
    encoder: nn.Module,
    quantizer: Callable[[], nn.Module],
    decoder: nn.Module,
    images: Tensor,
    *,
    plan: Training,
    seed: int,
    report: Report | None,
) -> nn.Module:
    """Train the three on pictures (N, C, H, W) uint8; the quantiser as it is in the end.

    `quantizer()` gives a module (B, D, h, w) -> (quantised, ids, loss). The networks are
    initialised by the seed, and torch's own generator is left as it was. Their matrices are
    bfloat16, the quantiser's float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for network in (encoder, decoder):
            network.apply(_start)
            network.train().requires_grad_(True)
        quantize = quantizer().train()
        weights = [*encoder.parameters(), *decoder.parameters(), *quantize.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=plan.lr, betas=(0.9, 0.98), weight_decay=1e-4)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.rate)
        begun = time.perf_counter()
        for step in range(1, plan.steps + 1):
            picked = philox.uniform(
                seed, torch.arange(plan.batch_size), 0, step, purpose=philox.SHUFFLE
            )
            batch = images[(picked * len(images)).long()].float() / 127.5 - 1
            with torch.autocast(batch.device.type, torch.bfloat16):
                features = encoder(batch)
                # Codes are searched and averaged in float32: the networks alone are bfloat16.
                with torch.autocast(batch.device.type, enabled=False):
                    quantised, ids, loss = quantize(features.float())
                back = decoder(quantised).float()
            error = back - batch
            value = error.abs().mean() + error.square().mean() + loss.sum()
            value = value + plan.edges * edge_error(error)
            plan.check_finite(value.detach(), f"step {step} of {plan.steps}")
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            rate.step()
            if report is not None and (step % REPORT_EVERY == 0 or step == plan.steps):
                psnr = -10 * torch.log10(error.detach().square().mean() / 4)
                report(
                    f"step {step} of {plan.steps}  loss {float(value.detach()):.4f}  "
                    f"psnr {float(psnr):.2f} dB  codes {ids.unique().numel()}  "
                    f"{time.perf_counter() - begun:.0f} s"
                )
    return quantize.eval()


def _start(module: nn.Module) -> None:
    """Initialise a layer; the last one of a residual branch is zero."""
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()
    if isinstance(module, ResidualBlock):
        nn.init.zeros_(module.second.weight)


def edge_error(error: Tensor) -> Tensor:
    """The mean absolute error of the differences between neighbouring pixels."""
    down = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    return down + across
