"""A text encoder of CLIP's kind (Radford et al. 2021), through transformers: words to vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdiff.denoiser import POOLED, STATES
from mdiff.errors import CheckpointError
from mdiff.files import (
    CONFIG,
    MAX_JSON_BYTES,
    MOST_IDS,
    MOST_LAYERS,
    TRANSFORMERS,
    Fields,
    ModelFiles,
    inside,
)

ARCHITECTURE = "CLIPTextModelWithProjection"
MOST_TOKENS = 1 << 16
# So many texts are kept with their vectors: a batch asks for the same ones again.
KEPT = 256
# Constants that older files hold and that transformers makes anew.
COUNTED = "position_ids"


class TextEncoder:
    """Texts to `STATES` and `POOLED`; see `load_text_encoder`. `tokenizer` is transformers'.

    `files` are those of the tokenizer's folder, by name, as they were.
    """

    def __init__(self, model: Any, tokenizer: Any, *, length: int, files: Mapping[str, bytes]):
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.files = dict(files)
        self._kept: dict[str, dict[str, Tensor]] = {}

    def ids(self, text: str) -> Tensor:
        """The text's ids (1, length) int64, cut or padded as the tokenizer does."""
        read = self.tokenizer(
            [text], padding="max_length", truncation=True, max_length=self.length,
            return_tensors="pt",
        )  # fmt: skip
        found: Tensor = read.input_ids
        return found

    @torch.no_grad()
    def told(self, text: str) -> dict[str, Tensor]:
        """What is told of a text, on the CPU: `STATES` (1, S, E), the states before the last
        layer, padding and all, and `POOLED` (1, P), the projection of the text's end.
        """
        if text not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            made = self.model(self.ids(text).to(self.model.device), output_hidden_states=True)
            found = {STATES: made.hidden_states[-2].cpu(), POOLED: made.text_embeds.cpu()}
            self._kept[text] = found
        return self._kept[text]

    def save(self, encoder: Path, tokenizer: Path) -> None:
        """Write the model into one folder and the tokenizer's files into the other."""
        self.model.save_pretrained(encoder)
        write_files(tokenizer, self.files)


def load_text_encoder(
    encoder: ModelFiles, tokenizer: Path, *, dtype: torch.dtype | None, device: torch.device
) -> TextEncoder:
    """The text encoder in two folders: `encoder` with the weights, `tokenizer` with its files.

    Raises CheckpointError for another architecture, sizes that cannot be meant, tensors that
    are missing, unexpected or of another shape, and a tokenizer that cannot be read.
    """
    described, folder = encoder.config, encoder.folder
    fields = Fields(described, str(folder / CONFIG))
    if described.get("architectures") != [ARCHITECTURE]:
        got = described.get("architectures")
        raise CheckpointError(f"{folder}: architectures {got!r}: expected [{ARCHITECTURE!r}]")
    places = fields.whole("max_position_embeddings", most=MOST_TOKENS)
    vocabulary = fields.whole("vocab_size", most=MOST_IDS)
    for name in ("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads"):
        fields.whole(name)
    fields.whole("num_hidden_layers", most=MOST_LAYERS)
    reader = _tokenizer(tokenizer)
    length = reader.model_max_length
    if not isinstance(length, int) or not 1 <= length <= places or len(reader) > vocabulary:
        raise CheckpointError(
            f"{tokenizer}: {length} tokens of {len(reader)} ids; the encoder has {places} places "
            f"and {vocabulary} ids"
        )
    model = _model(folder, dtype).to(device).eval().requires_grad_(False)
    return TextEncoder(model, reader, length=length, files=plain_files(tokenizer))


def _tokenizer(folder: Path) -> Any:
    try:
        with TRANSFORMERS:
            from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{folder} cannot be loaded as a tokenizer: {first}") from error


def _model(folder: Path, dtype: torch.dtype | None) -> Any:
    try:
        with TRANSFORMERS:
            from transformers import CLIPTextModelWithProjection, logging

            logging.disable_progress_bar()
            model, report = CLIPTextModelWithProjection.from_pretrained(
                str(folder), dtype=dtype or "auto", use_safetensors=True, local_files_only=True,
                output_loading_info=True,
            )  # fmt: skip
    except MemoryError:
        raise
    # Whatever the library raises on a file: it is not one that it can load.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{folder} cannot be loaded: {first}") from error
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = [name for name in sorted(map(str, report[problem])) if not name.endswith(COUNTED)]
        if names:
            raise CheckpointError(f"{folder}: {problem.replace('_', ' ')}: {', '.join(names[:4])}")
    return model


def plain_files(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name, to be written again as they were."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            if path.stat().st_size > MAX_JSON_BYTES:
                raise CheckpointError(f"{path}: at most {MAX_JSON_BYTES} bytes are read")
            # A snapshot of the Hub is made of links into the cache that it lies in.
            root = folder.parent.parent.parent
            found[path.name] = inside(folder, path.name, root=root).read_bytes()
    return found


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `plain_files` read."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
