"""Peak memory of loading a synthetic checkpoint of 2 GB, over the size of its files.

    python benchmarks/loader.py [--gigabytes 2]

The checkpoint, in MDLM's layout and in shards of about 256 MB, is made in a temporary folder and
removed. Each way of loading runs in a fresh process, which first loads a tiny model of the same
layout, so that imports are paid; its peak is VmHWM above what it then held. Beside ours: the
whole state dict read by safetensors, then copied into a module, as plain scripts do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from machine import record
from safetensors.torch import load_file, save_file

import mdiff
from mdiff.backbones.layers.backbone import Backbone
from mdiff.pipeline.published import built

WIDTH, VOCAB, SHARD = 2048, 8192, "256MB"
CONFIG = {
    "architectures": ["MDLM"], "cond_dim": 128, "hidden_dim": WIDTH, "model_length": 1024,
    "n_heads": 16, "time_conditioning": False, "vocab_size": VOCAB,
}  # fmt: skip
# What the issue allows.
ALLOWED = 1.1
WAYS = ("ours", "ours in bfloat16", "state dict, then copy")


def write(folder: Path, config: dict[str, Any]) -> int:
    """Write a checkpoint with random weights, a shard in memory at a time; its bytes."""
    module = built("mdlm", config)
    plan = split_torch_state_dict_into_shards(module.state_dict(), max_shard_size=SHARD)
    folder.mkdir()
    for name, members in plan.filename_to_tensors.items():
        shapes = {key: module.state_dict()[key].shape for key in members}
        shard = {key: torch.randn(shape) / WIDTH**0.5 for key, shape in shapes.items()}
        save_file(shard, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def loaded(way: str, folder: Path) -> Backbone:
    """The model by one of the ways."""
    if way == WAYS[2]:
        tensors: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
        module = built("mdlm", json.loads((folder / "config.json").read_text()))
        module = module.to_empty(device="cpu")
        module.load_state_dict(tensors)
        return module
    dtype = torch.bfloat16 if way == WAYS[1] else None
    model: Any = mdiff.load(folder, device="cpu", dtype=dtype).denoiser
    return model


def peak() -> int:
    """The most bytes that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(way: str, folder: Path) -> None:
    """Print the peak above the imports and the seconds of one load, as JSON."""
    loaded(way, folder / "tiny")
    before = peak()
    start = time.perf_counter()
    model = loaded(way, folder / "large")
    seconds = time.perf_counter() - start
    count = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"peak": peak() - before, "seconds": seconds, "parameters": count}))


def main() -> None:
    """Print and record the peak of each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
        return
    # 12 matrices of the width squared a block, in float32; the rest is small beside them.
    blocks = round(options.gigabytes * 1e9 / (12 * WIDTH**2 * 4))
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder / "tiny", CONFIG | {"hidden_dim": 32, "n_heads": 2, "n_blocks": 1})
        size = write(folder / "large", CONFIG | {"n_blocks": blocks})
        files = len(list((folder / "large").glob("*.safetensors")))
        print(f"{size / 1e9:.2f} GB in {files} files")
        figures: dict[str, Any] = {"bytes": size, "files": files, "allowed": ALLOWED, "ways": {}}
        for way in WAYS:
            run = subprocess.run(
                [sys.executable, __file__, "--measure", way, made],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = json.loads(run.stdout.splitlines()[-1])
            found["peak_over_files"] = found["peak"] / size
            figures["ways"][way] = found
            print(
                f"{way:<22} peak {found['peak'] / 1e9:.2f} GB, {found['peak_over_files']:.3f} of "
                f"the files, {found['seconds']:.1f} s"
            )
    figures["passed"] = figures["ways"][WAYS[0]]["peak_over_files"] <= ALLOWED
    record("loader", figures)


if __name__ == "__main__":
    main()
