"""The contract of a modality, and the capabilities that only some modalities have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from mdiff.tokens import Examples, TokenSpace

if TYPE_CHECKING:
    from mdiff.modalities.image.codec import Codec
    from mdiff.modalities.image.inpainting import Edits
    from mdiff.modalities.text.source import DataSource


class Modality(Protocol):
    """Media to token ids and back.

    A modality is a function of its options, found by name, that returns an object with these
    members. What only some modalities can do are the Protocols below, asked by `isinstance`.
    An item is one text, one image or whatever else the modality encodes; a prompt is a text or
    a mapping of what is given, by name.
    """

    @property
    def name(self) -> str:
        """The name that `find("modalities", name)` takes."""

    @property
    def unit(self) -> str:
        """The unit of the medium in which losses are reported, such as "byte" or "pixel"."""

    @property
    def space(self) -> TokenSpace:
        """The ids and the mask; ConfigError where they are still to be learnt from data."""

    def encode(self, item: object, /) -> list[int]:
        """The ids of an item, none of them masked; DataError where it does not fit."""

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The ids that the prompt gives, the others masked; `length` positions in all.

        Raises DataError for a prompt that does not fit, ConfigError for an invalid length.
        """

    def decode(self, ids: Sequence[int], /) -> object:
        """The item of these ids, such as a str or a PIL image; masked positions are left out."""

    def pieces(self, ids: Sequence[int], /) -> list[str | None]:
        """The text of each position for live views, None where it is masked."""

    def template(self, text: str, /) -> list[int]:
        """The canvas of a text with gaps; ConfigError where the medium has no such template."""

    def examples(
        self, data: Mapping[str, object] | str, *, length: int | None, split: str = "train"
    ) -> Examples:
        """The training rows of `data`, the recipe's section without `length`.

        `split` is "train", "validation" or "holdout". What is learnt from data, such as a
        tokenizer, is learnt from the training split here.
        """

    def sizes(self, items: Sequence[str], /) -> dict[str, int]:
        """How many units of other kinds than tokens the items have, by the unit's name."""

    def config(self) -> dict[str, object]:
        """The options that make this modality again, with its `name`."""

    def save(self, folder: str | Path) -> None:
        """Write what `config()` does not hold, such as a tokenizer or a codec."""


@runtime_checkable
class Conditional(Protocol):
    """A modality whose denoiser takes a condition beside the canvas."""

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """The unconditional branch's condition, each tensor (1, ...); empty where there is none."""

    def condition(self, prompt: object = "") -> Mapping[str, int | Tensor]:
        """The condition of one prompt, without a batch axis; empty for no condition."""


@runtime_checkable
class TextConditional(Protocol):
    """A modality whose condition is the encoding of a text."""

    def encode_condition(self, text: str) -> dict[str, Tensor]:
        """The condition of a text, each tensor (1, ...)."""


@runtime_checkable
class HasParts(Protocol):
    """A modality whose canvas is made of named parts one after the other."""

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts, in canvas order."""

    def span(self, part: str) -> slice:
        """The positions of a part; ConfigError with the nearest name for an unknown one."""


@runtime_checkable
class HasGrid(Protocol):
    """A modality whose canvas begins with a grid."""

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of the grid's tokens."""


@runtime_checkable
class HasLayout(Protocol):
    """A modality that sets options of the backbone which it is trained with."""

    @property
    def layout(self) -> list[tuple[int, int, int]]:
        """The canvas as runs of (rows, columns, codes per position), for the positions."""

    @property
    def classes(self) -> int:
        """How many labels are a condition; 0 where labels are no condition."""


@runtime_checkable
class EndsText(Protocol):
    """A modality with ids that end a text."""

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document, or None."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a document or, in a chat, a turn."""

    def decode(self, ids: Sequence[int], /, *, whole: bool = False) -> str:
        """The text up to the first id that ends it, or with `whole` all of it."""

    def pieces(self, ids: Sequence[int], /, *, whole: bool = False) -> list[str | None]:
        """The text of each position, as `decode` cuts it; joined, `decode`."""


@runtime_checkable
class HasSpecialTokens(Protocol):
    """A modality of text, whose tokenizer may have special tokens.

    `reads_special`: those that are typed in prompts, chats and templates are read as such, not
    refused.
    """

    reads_special: bool

    def no_text(self, columns: int, *, special: bool = True) -> set[int]:
        """The ids below `columns` that are no text, and, with `special`, special ones.

        Those that end a text and the mask are not among them.
        """


@runtime_checkable
class HasDocuments(Protocol):
    """A modality whose items are documents, read from files."""

    def documents(self, data: Mapping[str, object] | DataSource | str, /) -> list[str]:
        """The items of the recipe's section `data`, of the type that `encode` takes.

        Raises DataError with file and line or row where one cannot be read.
        """


@runtime_checkable
class ShowsImages(Protocol):
    """A modality with an image among the parts of its canvas."""

    codec: Codec

    def shown(self, tokens: Tensor) -> Tensor:
        """The images (B, C, H, W) uint8 of canvases (B, L), grey where a position is masked."""


class Description(NamedTuple):
    """What a canvas says of its image: None where it has no such part, or where it is masked."""

    label: str | None = None
    caption: str | None = None


@runtime_checkable
class Describes(Protocol):
    """A modality whose canvas may hold a label and a caption beside the image."""

    def described(self, ids: Sequence[int]) -> Description:
        """The label and the caption of a canvas."""


@runtime_checkable
class Editable(Protocol):
    """A modality whose items can be edited in a region."""

    def edited(
        self, picture: object, mask: object, *, given: Mapping[str, object], strength: float,
        seeds: Tensor,
    ) -> Edits:  # fmt: skip
        """The canvases of an item with what `mask` touches hidden; see `Pipeline.edit`."""


@runtime_checkable
class HasFolders(Protocol):
    """A modality read from a published directory, in which each module has a folder."""

    @property
    def denoiser_folder(self) -> str:
        """The folder of the denoiser."""

    @property
    def folders(self) -> Mapping[str, nn.Module]:
        """The modules beside the denoiser, by folder."""
