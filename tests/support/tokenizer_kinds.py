"""Tokenizers of every kind that checkpoints come with, built in a moment over a small alphabet."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Letters, accents, CJK, emoji with joiners and modifiers, combining marks, right-to-left, spaces.
SAMPLES = (
    "café naïve", "漢字 かな", "👩‍👩‍👧 👍🏽", "e\u0301 a\u0308\u0323", "שלום", "f(x) = 1, 2.5;",
    "don't", "  two  spaces", "line\nbreak\ttab", "ﷺ ½ ﬁ", "\u200b\ufeff", "\ufffd",
)  # fmt: skip
TEXT = " ".join(SAMPLES) + " the moon was pale and the cats sang of it " * 4
ROLES = {"mask_token": "<mask>", "eos_token": "<eos>", "pad_token": "<pad>"}
KINDS = (
    "byte_level", "byte_level_prefix", "byte_fallback", "legacy_llama", "word_piece", "unigram",
    "metaspace_first", "word_level", "bpe_suffix",
)  # fmt: skip


def built(kind: str) -> Tokenizer:
    """A tokenizer of one of KINDS, with "<unk>" where the kind needs one."""
    if kind.startswith("byte_level"):
        prefix = kind == "byte_level_prefix"
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )  # fmt: skip
        made.train_from_iterator([TEXT], trainer)
        return made
    if kind in ("byte_fallback", "legacy_llama"):
        letters = sorted(set("▁ abcdefghijklmnopqrstuvwxyz().,;'é") - {" "})
        names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁t", "▁th"]
        vocab = {name: i for i, name in enumerate(names)}
        made = Tokenizer(models.BPE(
            vocab, [("▁", "t"), ("▁t", "h")], unk_token="<unk>", byte_fallback=True, fuse_unk=True,
        ))  # fmt: skip
        if kind == "legacy_llama":
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        made.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        return made
    if kind == "word_piece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=200, special_tokens=["<unk>"], show_progress=False
        )
    elif kind in ("unigram", "metaspace_first"):
        scheme = "first" if kind == "metaspace_first" else "always"
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
        trainer = trainers.UnigramTrainer(
            vocab_size=160, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
    elif kind == "bpe_suffix":
        made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.decoder = decoders.BPEDecoder()
        trainer = trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>",
            show_progress=False,
        )  # fmt: skip
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    return made


def saved(kind: str, folder: Path) -> Path:
    """The folder, with a tokenizer of a kind in it that has roles and a chat's control tokens."""
    unknown = {} if kind.startswith("byte_level") else {"unk_token": "<unk>"}
    words = PreTrainedTokenizerFast(
        tokenizer_object=built(kind), additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        **ROLES, **unknown,
    )  # fmt: skip
    words.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    words.save_pretrained(folder)
    return folder
