"""Pictures of noise in every format that is written here, and a watch on programs."""

import functools
import io
import sys

import numpy as np
from PIL import Image

# Every format that Pillow writes of these pixels without another program.
WRITTEN = [
    "PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "DDS", "SPIDER", "IM",
    "BLP", "EPS", "ICO", "ICNS", "TGA", "PCX", "SGI", "JPEG2000", "MSP", "XBM",
]  # fmt: skip
READ = WRITTEN[:10]
MODE = {"SPIDER": "F", "BLP": "P", "MSP": "1", "XBM": "1", "GIF": "P", "PCX": "P"}
STARTED: list[str] = []
WATCHED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty")


def watch_programs():
    """Have every start of another program written to STARTED, from now on."""
    if not STARTED:
        STARTED.append("watched")
        sys.addaudithook(lambda event, _: STARTED.append(event) if event in WATCHED else None)
    del STARTED[1:]


def noise(height=8, width=16, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def content(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@functools.cache
def written(form):
    picture = Image.fromarray(noise(32, 32)).convert(MODE.get(form, "RGB"))
    options = {"save_all": True, "append_images": [picture]} if form in ("MPO", "TIFF") else {}
    return content(picture, form, **options)
