"""A batch of prompts of different lengths against the same prompts one by one, greedy.

    OMP_NUM_THREADS=2 python benchmarks/ragged.py

A model of LLaDA's layout with random weights, 12 layers of width 512, writes 64 tokens behind each
of eight prompts of 9 to 100 tokens, the most confident positions first, two a call. Both ways give
the same tokens; only generated tokens are counted. Interleaved in one process, the minimum of
three.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from machine import record

from mdiff.backbones.published.llada import llada
from mdiff.sampling.run import sample
from mdiff.tokens import TokenSpace, stack

SHAPE = {
    "architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 512, "n_layers": 12,
    "n_heads": 8, "n_kv_heads": 8, "mlp_hidden_size": 1536, "vocab_size": 4096,
    "embedding_size": 4096, "max_sequence_length": 256, "rope_theta": 500000.0,
    "rope_full_precision": True, "rms_norm_eps": 1e-5, "activation_type": "silu",
    "block_type": "llama", "layer_norm_type": "rms", "include_bias": False,
    "include_qkv_bias": False, "attention_layer_norm": False, "weight_tying": False,
    "scale_logits": False, "input_emb_norm": False, "mask_token_id": 4095, "rope": True,
    "alibi": False, "mlp_ratio": 4,
}  # fmt: skip
LENGTHS = (9, 17, 23, 31, 48, 64, 77, 100)
ANSWER, REPEATS = 64, 3


def main() -> None:
    """Both ways in turns; the figures into benchmarks/results/ragged.json."""
    torch.manual_seed(0)
    model: Any = llada(SHAPE).eval()
    space = TokenSpace(SHAPE["embedding_size"], mask_id=SHAPE["mask_token_id"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # So that logits are apart, and rounding decides nothing.
            weight.fill_(1.0) if "norm" in name or "ln_f" in name else weight.normal_(std=0.06)
    prompts = [torch.randint(4000, (length,)).tolist() for length in LENGTHS]
    canvases = [prompt + [space.mask_id] * ANSWER for prompt in prompts]
    options: dict[str, Any] = {
        "space": space, "sampler": "confidence", "temperature": 0.0, "steps": ANSWER // 2,
        "counts": "even",
    }  # fmt: skip

    def together() -> list[list[int]]:
        tokens, valid = stack(canvases, space=space)
        done = sample(model, tokens, valid=valid, **options).tokens
        counted = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        return [row[keep].tolist() for row, keep in zip(done, counted)]

    def alone() -> list[list[int]]:
        return [
            sample(model, torch.tensor([canvas]), **options).tokens[0].tolist()
            for canvas in canvases
        ]

    seconds: dict[str, list[float]] = {"batch": [], "one by one": []}
    same = True
    for _ in range(REPEATS):
        begun = time.perf_counter()
        batch = together()
        between = time.perf_counter()
        single = alone()
        seconds["batch"].append(between - begun)
        seconds["one by one"].append(time.perf_counter() - between)
        same = same and batch == single
    rates = {name: len(prompts) * ANSWER / min(each) for name, each in seconds.items()}
    ratio = rates["batch"] / rates["one by one"]
    print(f"same tokens: {same}; {ratio:.2f} times the tokens a second: {rates}")
    figures = {"same_tokens": same, "ratio": ratio, "tokens_per_second": rates, "seconds": seconds}
    record("ragged", figures | {"lengths": LENGTHS, "answer": ANSWER})


if __name__ == "__main__":
    main()
