"""How well a codec gives pictures back, and how it uses its codebook."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mdiff.errors import BackendError
from mdiff.modalities.image.codec import Codec


@dataclass(frozen=True)
class Fidelity:
    """What a codec keeps of pictures.

    `psnr` dB over all of them (inf where nothing is lost), `ssim` in [0, 1], `usage` the share
    of the codebook that they use, `perplexity` 2^entropy of the ids, `bits_per_pixel` the
    code's length.
    """

    psnr: float
    ssim: float
    usage: float
    perplexity: float
    bits_per_pixel: float


def fidelity(codec: Codec, images: Tensor, *, batch_size: int = 256) -> Fidelity:
    """How well the codec gives back `images` (N, C, H, W) uint8; BackendError without torchmetrics.

    SSIM with the usual 11 x 11 Gaussian window (Wang et al. 2004), on 0 to 255.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim
    except ImportError:
        raise BackendError(
            "torchmetrics is not installed: pip install 'mdiff-toolkit[eval]'"
        ) from None
    squares = similarity = 0.0
    counts = torch.zeros(codec.codebook_size, dtype=torch.int64)
    codes = 0
    for some in torch.split(images, batch_size):
        ids = codec.encode(some)
        back = codec.decode(ids)
        counts += ids.flatten().bincount(minlength=codec.codebook_size)
        codes = ids[0].numel()
        squares += float((some.double() - back.double()).square().sum())
        alike = ssim(back.float(), some.float(), data_range=255.0)
        similarity += float(torch.as_tensor(alike)) * len(some)
    error = squares / images.numel()
    share = counts[counts > 0].double() / counts.sum()
    entropy = -float((share * share.log2()).sum())
    pixels = images.shape[2] * images.shape[3]
    bits = codes * torch.log2(torch.tensor(float(codec.codebook_size))).item() / pixels
    return Fidelity(
        psnr=float("inf") if error == 0 else 10 * float(torch.log10(torch.tensor(255**2 / error))),
        ssim=similarity / len(images),
        usage=float((counts > 0).double().mean()),
        perplexity=2**entropy,
        bits_per_pixel=bits,
    )
