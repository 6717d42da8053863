"""A text encoder of CLIP's kind (Radford et al. 2021), loaded by transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

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
from mdiff.modalities.image.captions import check_unicode, warn_of_cuts

if TYPE_CHECKING:
    from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerBase

ARCHITECTURE = "CLIPTextModelWithProjection"
MOST_TOKENS = 1 << 16
# Of a tokenizer all of one of these.
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# Encodings that are cached: a batch asks for the same texts again.
MOST_CACHED = 256
# A buffer in older files that transformers regenerates.
COUNTED = "position_ids"


class TextEncoder:
    """Encodes texts as `STATES` and `POOLED`; see `load_text_encoder`.

    `files` are those of the tokenizer's folder, by name, as they were.
    """

    def __init__(
        self, model: CLIPTextModelWithProjection, tokenizer: PreTrainedTokenizerBase, *,
        length: int, files: Mapping[str, bytes],
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.files = dict(files)
        self._cached: dict[str, dict[str, Tensor]] = {}

    def ids(self, text: str) -> Tensor:
        """The text's ids (1, length) int64, cut or padded as the tokenizer does.

        Raises DataError for a text that is not valid Unicode.
        """
        check_unicode(text)
        read = self.tokenizer(
            [text], padding="max_length", truncation=True, max_length=self.length,
            return_tensors="pt",
        )  # fmt: skip
        found: Tensor = read["input_ids"]
        return found

    def warn_of_cuts(self, texts: Iterable[str]) -> None:
        """Say how many texts are longer than the encoder reads."""
        read = (self.tokenizer(text, verbose=False)["input_ids"] for text in texts)
        warn_of_cuts(map(len, read), self.length)

    @torch.no_grad()
    def encode(self, text: str) -> dict[str, Tensor]:
        """The encoding of a text, on the CPU.

        `STATES` (1, S, E) are the states before the last layer, padding included; `POOLED` (1, P)
        is the projection of the state at the text's end.
        """
        if text not in self._cached:
            if len(self._cached) >= MOST_CACHED:
                self._cached.clear()
            made = self.model(self.ids(text).to(self.model.device), output_hidden_states=True)
            found = {STATES: made.hidden_states[-2].cpu(), POOLED: made.text_embeds.cpu()}
            self._cached[text] = found
        return self._cached[text]

    def save(self, encoder: Path, tokenizer: Path) -> None:
        """Write the model into one folder and the tokenizer's files into the other."""
        self.model.save_pretrained(encoder)
        write_files(tokenizer, self.files)


def load_text_encoder(
    encoder: ModelFiles, tokenizer: Path, *, dtype: torch.dtype | None, device: torch.device
) -> TextEncoder:
    """The text encoder in two folders: `encoder` with the weights, `tokenizer` with its files.

    Raises CheckpointError for another architecture, invalid sizes, tensors that are missing,
    unexpected or of another shape, and a tokenizer that cannot be read.
    """
    described, folder = encoder.config, encoder.folder
    fields = Fields(described, str(folder / CONFIG))
    if described.get("architectures") != [ARCHITECTURE]:
        got = described.get("architectures")
        raise CheckpointError(f"{folder}: architectures {got!r}: expected [{ARCHITECTURE!r}]")
    positions = fields.whole("max_position_embeddings", most=MOST_TOKENS)
    vocabulary = fields.whole("vocab_size", most=MOST_IDS)
    for name in ("hidden_size", "intermediate_size", "projection_dim", "num_attention_heads"):
        fields.whole(name)
    fields.whole("num_hidden_layers", most=MOST_LAYERS)
    reader = _tokenizer(tokenizer)
    length = reader.model_max_length
    if not isinstance(length, int) or not 1 <= length <= positions or len(reader) > vocabulary:
        raise CheckpointError(
            f"{tokenizer}: {length} tokens of {len(reader)} ids; the encoder has {positions} "
            f"positions and {vocabulary} ids"
        )
    model = _model(folder, dtype)
    model.to(device).eval().requires_grad_(False)
    return TextEncoder(model, reader, length=length, files=plain_files(tokenizer))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}/ is missing: the text encoder's tokenizer lies there")
    if not any(all((folder / name).is_file() for name in each) for each in TOKENIZER_FILES):
        wanted = " or ".join(" and ".join(each) for each in TOKENIZER_FILES)
        raise CheckpointError(f"{folder}/ lacks {wanted}")
    with _loading(f"{folder} cannot be loaded as a tokenizer"):
        from transformers import AutoTokenizer

        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    return found


@contextmanager
def _loading(fault: str) -> Iterator[None]:
    """CheckpointError for whatever the library raises on a file: it is not one that it can load."""
    try:
        with TRANSFORMERS:
            yield
    except MemoryError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise CheckpointError(f"{fault}: {first}") from error


def _model(folder: Path, dtype: torch.dtype | None) -> CLIPTextModelWithProjection:
    with _loading(f"{folder} cannot be loaded"):
        from transformers import CLIPTextModelWithProjection

        model, report = CLIPTextModelWithProjection.from_pretrained(
            str(folder), dtype=dtype or "auto", use_safetensors=True, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
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
