"""Every masked language model that transformers has, built tiny and random."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

KINDS = dict(MODEL_FOR_MASKED_LM_MAPPING_NAMES)
VOCABULARY, MASK, PAD, POSITIONS = 99, 4, 1, 80
# By whatever name a configuration has for it.
SIZES = {
    "vocab_size": VOCABULARY, "pad_token_id": PAD, "mask_token_id": MASK, "bos_token_id": 0,
    "eos_token_id": 2, "cls_token_id": 0, "sep_token_id": 2, "max_position_embeddings": POSITIONS,
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "embedding_size": 32, "emb_dim": 32, "n_layers": 2,
    "n_heads": 4, "dim": 32, "hidden_dim": 37, "d_model": 32, "n_head": 4, "d_head": 8,
    "d_inner": 37, "attention_window": 8, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 1,
    "entity_vocab_size": 9, "entity_emb_size": 32, "embedding_rank": 16,
}  # fmt: skip
# An image tower beside the text.
TOWER = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1,
         "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
ODD = {
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "num_decoder_layers": 1},
    "reformer": {
        "num_hidden_layers": None, "is_decoder": False, "axial_pos_embds": False,
        "attention_head_size": 8, "feed_forward_size": 37, "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4,
    },
    "squeezebert": {"intermediate_size": 64},
    "neomme": {"hidden_size": 64, "head_dim": 16},
    "xmod": {"languages": ["en_XX"]},
    "perceiver": {"num_cross_attention_heads": 4, "num_self_attention_heads": 4},
    "modernvbert": {"text_config": SIZES, "vision_config": TOWER, "image_token_id": 98},
    "ultravbert": {"text_config": SIZES, "vision_config": TOWER, "image_token_id": 98},
}  # fmt: skip
# Those of images that decide what to do by their own defaults.
MOST_WEIGHTS = 20_000_000


def tiny(kind: str, *, std: float | None = 0.2, **settings: object) -> PreTrainedModel:
    """A model of that model_type; `std` is of its matrices, None leaves the library's own.

    Raises MemoryError for one of more than MOST_WEIGHTS.
    """
    plain = AutoConfig.for_model(kind)
    given = {k: v for k, v in SIZES.items() if k in vars(plain) or hasattr(plain, k)}
    given = {k: v for k, v in (given | ODD.get(kind, {}) | settings).items() if v is not None}
    model_class = getattr(transformers, KINDS[kind])
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(type(plain)(**given)).parameters())
    if size > MOST_WEIGHTS:
        raise MemoryError(f"{kind}: {size:,} weights")
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(type(plain)(**given)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and std is not None:
                nn.init.normal_(parameter, std=std)
    return model
