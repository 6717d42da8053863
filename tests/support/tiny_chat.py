"""A small model of text with a chat template, untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

COLUMNS, END, PAD, MASK, START = 300, 256, 257, 258, 259
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_model(
    folder: Path, columns: int = COLUMNS, *, template: str | None = TEMPLATE,
    generation: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A random adapted Qwen2 with a byte-level tokenizer and, by default, a ChatML template.

    `generation` is its generation_config.json.
    """
    import torch

    bytes_ = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        mask_token="<|mask|>", additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    words.chat_template = template
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=columns, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, head_dim=8,
        tie_word_embeddings=False,
    )).save_pretrained(folder)  # fmt: skip
    words.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["A2DQwen2LMHeadModel"], "mask_token_id": words.mask_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder
