"""Any tokenizer of the Hugging Face libraries."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mdiff.errors import BackendError, CheckpointError, DataError
from mdiff.files import TRANSFORMERS, read_json, refuse_special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
# What ends a text or a turn of a chat, whichever of them a tokenizer calls its end.
ENDS = ("<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>")
# Classes that come as code beside a model, and those of transformers that read the same files.
SAME_AS = {"DreamTokenizer": "Qwen2Tokenizer"}


class Pretrained:
    """Any tokenizer of the Hugging Face libraries, by path or Hub id; its code is never run."""

    lossless = False

    def __init__(self, name: str) -> None:
        path = Path(name)
        if path.is_dir():
            refuse_special(path)
        try:
            with TRANSFORMERS:
                self.inner = self._loaded(path)
            self._read_ids()
        except Exception as error:
            kind = CheckpointError if path.exists() else BackendError
            first = str(error).strip().split("\n")[0]
            raise kind(
                f"tokenizer {name!r} cannot be loaded: {first}; "
                "known: byte, char, bpe, a path, a Hub id"
            ) from error

    @staticmethod
    def _loaded(path: Path) -> PreTrainedTokenizerBase:
        if path.is_file():
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        with _quiet():
            return _class_of(path).from_pretrained(str(path), trust_remote_code=False)

    def _read_ids(self) -> None:
        """The ids that the tokenizer names; of a damaged one, asking for them may fail."""
        self.size = len(self.inner)
        self.mask_id: int | None = self.inner.mask_token_id
        end = self.inner.eos_token_id
        self.eos_id: int | None = self.inner.sep_token_id if end is None else end
        self.pad_id: int | None = self.inner.pad_token_id
        named = self.inner.get_added_vocab()
        ends = {named[token] for token in ENDS if token in named}
        self.end_ids = tuple(sorted(ends | ({self.eos_id} if self.eos_id is not None else set())))
        kept = {self.mask_id, self.eos_id, self.inner.unk_token_id}
        self.never = tuple(sorted(set(self.inner.all_special_ids) - kept))

    def encode(self, text: str) -> list[int]:
        """The ids, with no special tokens added."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens left out."""
        text: str = self.inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, said: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of what a user said, or of {"role", "content"} messages, up to the answer.

        By the tokenizer's own template, which its library renders in a sandbox. Raises DataError
        where it has none or refuses these messages.
        """
        if not self.inner.chat_template:
            raise DataError("this tokenizer has no chat template: give a plain prompt instead")
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": said}] if isinstance(said, str) else said
        try:
            ids: list[int] = self.inner.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True,
                tokenize=True, return_dict=False,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template refuses these messages: {error}") from error
        return ids

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text before it."""
        texts = [""] + [self.decode(ids[: i + 1]) for i in range(len(ids))]
        return [after[len(before) :] for before, after in pairwise(texts)]

    def save(self, folder: Path) -> None:
        """Write its own files."""
        self.inner.save_pretrained(str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's warnings on configs of models that it does not know."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(before)


def _class_of(folder: Path) -> type[PreTrainedTokenizerBase]:
    """The class of transformers that reads the tokenizer in `folder`."""
    import transformers

    settings = folder / SETTINGS
    named = read_json(settings).get("tokenizer_class") if settings.exists() else None
    # By its name: transformers loads its classes as they are asked for.
    found: type[PreTrainedTokenizerBase] = getattr(
        transformers, SAME_AS.get(str(named), "AutoTokenizer")
    )
    return found
