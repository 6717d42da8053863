"""Any tokenizer of the Hugging Face libraries."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdiff.errors import BackendError, CheckpointError, ConfigError, DataError, nearest
from mdiff.files import TRANSFORMERS, read_json, refuse_special
from mdiff.modalities.text.tokenizers import OWN, decoded, text_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Inner
    from transformers import PreTrainedTokenizerBase

SETTINGS = "tokenizer_config.json"
# Files that name the roles of a tokenizer's special tokens.
ROLES = (SETTINGS, "special_tokens_map.json")
# What ends a text or a turn of a chat, whichever of them a tokenizer calls its end.
ENDS = (
    "<|endoftext|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>", "</s>", "<|role_end|>",
    "<|end_of_text|>",
)  # fmt: skip
NO_TEMPLATE = "this tokenizer has no chat template: give a plain prompt instead"
# An answer, to find what a template puts behind it.
SAID = "An answer."
# Texts that a tokenizer is asked to put before others; tried before the tokens of its vocabulary.
PROBES, TRIED = ("x", "0", ".", "the"), 500
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
        import transformers

        folder, own = (path.parent, {"tokenizer_file": str(path)}) if path.is_file() else (path, {})
        # A file with its settings beside it has the roles that they name.
        if own and not any((folder / name).exists() for name in ROLES):
            return transformers.PreTrainedTokenizerFast(**own)
        settings = folder / SETTINGS
        named = read_json(settings).get("tokenizer_class") if settings.exists() else None
        # By its name: transformers loads its classes as they are asked for.
        kind = getattr(transformers, SAME_AS.get(str(named), "AutoTokenizer"))
        verbosity = transformers.logging.get_verbosity()
        # Without the library's warnings on configs of models that it does not know.
        transformers.logging.set_verbosity_error()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                return kind.from_pretrained(str(folder), trust_remote_code=False, **own)
        finally:
            transformers.logging.set_verbosity(verbosity)

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
        roles = set(self.inner.all_special_ids)
        kept = {self.mask_id, self.eos_id, self.inner.unk_token_id}
        self.never = tuple(sorted(roles - kept))
        added = self.inner.added_tokens_decoder.items()
        self._special = frozenset(roles | {i for i, token in added if token.special})

    def special_in(self, ids: Sequence[int]) -> str | None:
        """The first special token among the ids, by its text.

        That of unknown text is none, unless it has another role (Qwen's also ends a text).
        """
        unknown = {self.inner.unk_token_id} - {self.pad_id, *self.end_ids}
        first = next((i for i in ids if i in self._special and i not in unknown), None)
        return None if first is None else str(self.inner.convert_ids_to_tokens(first))

    def no_text(self, columns: int, *, special: bool = True) -> set[int]:
        """The ids below `columns` that it does not have and, with `special`, its special ones."""
        missing = set(range(columns)) - set(self.inner.get_vocab().values())
        own = {i for i in self._special if i < columns} if special else set()
        return (missing | own) - set(self.end_ids)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """The ids, with no special tokens added; no space either where the text `continues`."""
        ids = self._encode(text)
        if not continues or not ids or self._fits(text, ids):
            return ids
        plain = self.decode(ids, continues=True).lstrip()
        for other in self._without_prefix(text):
            if self._fits(text, other) and self.decode(other, continues=True).lstrip() == plain:
                return other
        return ids

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.inner.encode(text, add_special_tokens=False, verbose=False)
        return ids

    def _fits(self, text: str, ids: Sequence[int]) -> bool:
        """Whether the ids, inside a text, begin with as much white space as this one does."""
        return _indent(self.decode(ids, continues=True)) == _indent(text)

    def _without_prefix(self, text: str) -> Iterator[list[int]]:
        """The ids of a text inside another: by a copy that adds no prefix, and behind a probe."""
        if self._bare is not None:
            yield self._bare.encode(text, add_special_tokens=False).ids
        for probe in PROBES:
            first = self._encode(probe)
            ids = self._encode(probe + text)
            if ids[: len(first)] == first:
                yield ids[len(first) :]

    @cached_property
    def _bare(self) -> Inner | None:
        """The tokenizer without what it puts before a text; None for one in Python."""
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        if not isinstance(self.inner, PreTrainedTokenizerFast):
            return None
        settings = json.loads(self.inner.backend_tokenizer.to_str())
        for name in ("normalizer", "pre_tokenizer"):
            settings[name] = _unprefixed(settings[name])
        bare: Inner = Tokenizer.from_str(json.dumps(settings))
        return bare

    @cached_property
    def _probe(self) -> list[int]:
        """Ids of a word, for others to stand behind; empty where none decodes to a word."""
        several = (self._encode(probe) for probe in PROBES)
        for ids in chain(several, ([i] for i in range(min(self.size, TRIED)))):
            word = self.decode(ids)
            if word.isalnum() and not self._special.intersection(ids):
                return ids
        return []

    def _spoken(self, ids: Sequence[int]) -> str:
        text: str = self.inner.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """The text, special tokens left out."""
        return decoded(self._spoken, ids, behind=self._probe) if continues else self._spoken(ids)

    def pieces(self, ids: Sequence[int], *, continues: bool = False) -> list[str]:
        """What each id adds to the text before it; of a special one, nothing."""
        found = [""] * len(ids)
        shown = [i for i, token in enumerate(ids) if token not in self._special]
        behind = self._probe if continues else []
        parts = text_pieces(self._spoken, [ids[i] for i in shown], behind=behind)
        for i, part in zip(shown, parts):
            found[i] = part
        return found

    def chat(self, messages: Sequence[Mapping[str, object]], **given: object) -> list[int]:
        """The ids of {"role", "content"} messages, up to the answer.

        A last message of the assistant is the beginning of the answer, which goes on. By the
        tokenizer's own template, which its library renders in a sandbox; `given` are its tools
        and documents. Raises DataError where it has none, refuses these messages, or leaves out
        what is given or a message of neither the user nor the assistant.
        """
        if not self.inner.chat_template:
            raise DataError(NO_TEMPLATE)
        said = [dict(one) for one in messages]
        written = self._rendered(said, **given)
        for name in given:
            if given[name] and self._rendered(said, **{**given, name: None}) == written:
                raise DataError(f"the chat template leaves out {name}: it has no use for them")
        for number, one in enumerate(said):
            if one["role"] in ("user", "assistant") or not isinstance(one["content"], str):
                continue
            other = [*said[:number], {**one, "content": f"{one['content']}?"}, *said[number + 1 :]]
            if self._rendered(other, **given) == written:
                raise DataError(
                    f"the chat template leaves out message {number + 1}, of role {one['role']}: "
                    "say the same in a message of the user"
                )
        ids: list[int] = self._rendered(said, tokenize=True, return_dict=False, **given)
        return ids

    def _rendered(self, said: list[dict[str, Any]], **options: object) -> Any:
        """Messages by the template, as a text or ids; DataError where it refuses them."""
        from jinja2 import TemplateError

        begun = said[-1]["role"] == "assistant"
        try:
            return self.inner.apply_chat_template(
                said, **{
                    "add_generation_prompt": not begun, "continue_final_message": begun,
                    "tokenize": False, **options,
                },
            )  # fmt: skip
        except (
            TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
            RecursionError,
        ) as error:  # fmt: skip
            raise DataError(f"the chat template refuses these messages: {error}") from error

    @cached_property
    def turn_end(self) -> list[int]:
        """The added token that the chat template puts behind an answer; empty without one."""
        if not self.inner.chat_template:
            return []
        turns = [{"role": role, "content": SAID} for role in ("user", "assistant")]
        try:
            text = self._rendered(turns, continue_final_message=False)
        except DataError:
            return []
        added = self._special.union(self.inner.get_added_vocab().values())
        behind = self._encode(str(text).rpartition(SAID)[2])
        return [i for i in behind if i in added][:1]

    def save(self, folder: Path) -> None:
        """Write its own files."""
        self.inner.save_pretrained(str(folder))


def path_or_id(name: str) -> str:
    """The path, or else Hub id, of a tokenizer; ConfigError for what is nearly one of OWN."""
    path = Path(name).expanduser()
    close = nearest(name, OWN)
    if "/" not in name and not path.exists() and close.startswith("did you mean"):
        raise ConfigError(f"unknown tokenizer {name!r}; {close}")
    return str(path)


def _indent(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _unprefixed(part: object) -> object:
    """A normaliser or pre-tokenizer, as tokenizer.json describes it, that adds no prefix."""
    if isinstance(part, list):
        inner = [_unprefixed(one) for one in part]
        return [one for one in inner if one is not None]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off[key] if key in off else _unprefixed(value) for key, value in part.items()}
