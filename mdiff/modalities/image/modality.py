"""Pictures: a codec's ids, with a label and a caption as further parts of the canvas if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from torch import Tensor

from mdiff.errors import CheckpointError, ConfigError, DataError, nearest
from mdiff.files import read_json
from mdiff.modalities.image.captions import Captions
from mdiff.modalities.image.codec import Codec, load_codec, make_codec, save_codec
from mdiff.modalities.image.data.examples import PictureRows, variants
from mdiff.modalities.image.data.images import (
    Pictures,
    PictureSource,
    digest_of,
    read_pictures,
    split_index,
)
from mdiff.modalities.image.data.readers import as_array
from mdiff.modalities.image.data.token_shards import Shards, holds_shards, open_shards
from mdiff.modalities.image.inpainting import (
    Edits,
    as_picture,
    hidden_share,
    pixel_mask,
    shown_pictures,
    touched,
)
from mdiff.modalities.image.parts import CanvasParts, Part
from mdiff.modalities.protocol import Modality
from mdiff.tokens import TokenSpace

SETTINGS = "modality.json"
LABELS = ("none", "condition", "part")


class ImageModality:
    """Pictures to tokens and back; see `image`.

    The canvas is the picture's places row by row, each with its codes side by side, then the
    label's place and the caption's places where these are parts; the ids of the parts lie one
    after the other, then the mask. Below this room `grid` and `layout` are plain integers.
    """

    name = "image"

    def __init__(
        self, codec: Codec, *, size: tuple[int, int], labels: list[str] | None, label: str,
        captions: Captions | None,
    ) -> None:  # fmt: skip
        self.codec, self.size, self.labels = codec, size, labels
        self.label, self.captions = label, captions

    @property
    def unit(self) -> str:
        """What a token of a picture alone stands for: "dim" of pixels, or "pixel" of a code."""
        if len(self.part_names) > 1:
            return "token"
        return "dim" if self.codec.lossless else "pixel"

    @property
    def latent_grid(self) -> tuple[int, int]:
        """The picture's positions (h, w)."""
        return self.size[0] // self.codec.stride, self.size[1] // self.codec.stride

    @property
    def grid(self) -> tuple[int, int]:
        """The picture's tokens as a grid of plain integers, codes of a place side by side."""
        return self.latent_grid[0], self.latent_grid[1] * self.codec.codes_per_position

    @property
    def parts(self) -> CanvasParts:
        """What a canvas is made of."""
        layout = (*self.latent_grid, self.codec.codes_per_position)
        found = [Part("image", layout, self.codec.codebook_size)]
        if self.label == "part":
            found.append(Part("label", (1, 1, 1), len(self._known_labels())))
        if self.captions:
            found.append(Part("caption", (1, self.captions.length, 1), self.captions.size))
        return CanvasParts(tuple(found))

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the canvas's parts, in order."""
        more = ["label"] if self.label == "part" else []
        return ("image", *more, *(["caption"] if self.captions else []))

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of what a prompt may give."""
        return (*self.part_names, *(["label"] if self.label == "condition" else []))

    @property
    def layout(self) -> list[tuple[int, int, int]]:
        """The canvas as runs of (h, w, tokens a place), for a backbone's positions."""
        return self.parts.layout

    @property
    def space(self) -> TokenSpace:
        """Ids of all parts, and the mask after them."""
        return self.parts.space

    @property
    def length(self) -> int:
        """Tokens of a canvas."""
        return self.parts.length

    def span(self, part: str) -> slice:
        """The places of a part in the canvas."""
        return self.parts.span(part)

    @property
    def classes(self) -> int:
        """How many labels the backbone is told of; 0 where labels are no condition."""
        return len(self._known_labels()) if self.label == "condition" else 0

    @property
    def null_condition(self) -> dict[str, Tensor]:
        """The null condition: the label after the last, {} where labels are no condition."""
        return {"label": torch.tensor([self.classes], device="cpu")} if self.classes else {}

    def _known_labels(self) -> list[str]:
        if not self.labels:
            raise ConfigError("the labels are not known yet: give modality.labels or data first")
        return self.labels

    def picture(self, given: object) -> Tensor:
        """A PIL image, array or path as (C, H, W) uint8 of this size; DataError otherwise."""
        if isinstance(given, str | Path):
            source = PictureSource(source=str(given))
            return read_pictures(source, channels=self.codec.channels, size=self.size).pixels[0]
        array = as_array(given, channels=self.codec.channels)
        if array.shape[:2] != tuple(self.size):
            raise DataError(
                f"the picture has {array.shape[0]} x {array.shape[1]} pixels, this model's have "
                f"{self.size[0]} x {self.size[1]}"
            )
        return torch.from_numpy(array.copy()).permute(2, 0, 1)

    def codes(self, pictures: Tensor) -> Tensor:
        """The tokens (B, places) int64 of pictures (B, C, H, W) uint8."""
        return self.codec.encode(pictures).flatten(1)

    def label_id(self, label: str | int) -> int:
        """The number of a label by its name or number; DataError with the nearest names."""
        known = self._known_labels()
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(known):
            return label
        name = str(label).lower()
        if name not in known:
            raise DataError(f"unknown label {label!r}; {nearest(name, known)}")
        return known.index(name)

    def caption_ids(self, caption: str, *, cut: bool = False) -> list[int]:
        """The caption's ids in the canvas; one that is too long is cut, or a DataError."""
        ids = self.parts.ids("caption")
        known = self.captions
        return [] if known is None else [ids[i] for i in known.encode(caption, cut=cut)]

    def encode(self, given: object) -> list[int]:
        """The canvas of an item in full: a picture, or a mapping with every part."""
        prompt = given if isinstance(given, Mapping) else {"image": given}
        canvas = self.canvas(prompt)
        if self.space.mask_id in canvas:
            raise DataError(f"expected {', '.join(self.part_names)}, got {', '.join(prompt)}")
        return canvas

    def canvas(self, prompt: object = "", length: int | None = None) -> list[int]:
        """The canvas with what the prompt gives: "image", "label" or "caption" where a part.

        A string is a caption. Raises DataError for keys that this model does not take, and
        ConfigError for a length other than the model's.
        """
        if length not in (None, self.length):
            raise ConfigError(f"length={length}: this model's canvas has {self.length} tokens")
        asked = self._asked(prompt)
        canvas = [self.space.mask_id] * self.length
        if "image" in asked:
            canvas[self.span("image")] = self.codes(self.picture(asked["image"])[None])[0].tolist()
        if "label" in asked and self.label == "part":
            number = self.label_id(asked["label"])
            canvas[self.span("label")] = [self.parts.ids("label")[number]]
        if "caption" in asked:
            canvas[self.span("caption")] = self.caption_ids(asked["caption"])
        return canvas

    def condition(self, prompt: object = "") -> Mapping[str, int | Tensor]:
        """What the backbone is told of a prompt: the label's number where it is a condition."""
        asked = self._asked(prompt)
        if not self.classes or "label" not in asked:
            return {}
        return {"label": self.label_id(asked["label"])}

    def _asked(self, prompt: object) -> dict[str, Any]:
        if isinstance(prompt, str):
            prompt = {"caption": prompt} if prompt else {}
        if not isinstance(prompt, Mapping):
            raise DataError(f"prompt {prompt!r:.60}: expected a text or a mapping such as "
                            f"{{{self.takes[0]!r}: ...}}")  # fmt: skip
        for key in prompt:
            if key not in self.takes:
                raise DataError(f"this model takes no {key!r}; known: {', '.join(self.takes)}")
        return {key: value for key, value in prompt.items() if value is not None}

    def edited(
        self, picture: object, mask: object, *, given: Mapping[str, object], strength: float,
        seeds: Tensor,
    ) -> Edits:  # fmt: skip
        """The canvases of a picture with what `mask` touches hidden; see `Pipeline.edit`."""
        if "image" in given:
            raise DataError("the picture to edit is the image: give other parts only")
        original = self.picture(picture)
        region = pixel_mask(mask, self.size)
        canvas = torch.tensor(self.canvas({"image": picture, **given}), device="cpu")
        may = torch.zeros(self.length, dtype=torch.bool, device="cpu")
        each = touched(self.codec, region).flatten()
        may[self.span("image")] = each.repeat_interleave(self.codec.codes_per_position)
        canvases = [
            torch.where(hidden, self.space.mask_id, canvas).tolist()
            for hidden in hidden_share(may, strength=strength, seeds=seeds)
        ]
        return Edits(canvases, original, None if mask is None else region)

    def template(self, text: str) -> list[int]:
        """Refused: pictures have no gaps in a line of text."""
        raise ConfigError("this model fills in pictures: use edit, or generate with what is given")

    def decode(self, ids: Sequence[int]) -> Pillow.Image:
        """The picture; `info` holds the label and the caption where they are parts.

        Hidden places are grey.
        """
        picture = self.shown(torch.tensor([ids], device="cpu"))[0]
        said: dict[str, Any] = {}
        if "label" in self.part_names:
            said["label"] = self._said_label(ids[self.span("label").start])
        if "caption" in self.part_names:
            said["caption"] = self._said_caption(ids[self.span("caption")])
        made = as_picture(picture)
        made.info.update(said)
        return made

    def shown(self, tokens: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of canvases (B, L), hidden places grey."""
        layout = (*self.latent_grid, self.codec.codes_per_position)
        codes = tokens[:, self.span("image")].reshape(-1, *layout)
        return shown_pictures(self.codec, codes, mask_id=self.space.mask_id)

    def _said_label(self, token: int) -> str | None:
        ids = self.parts.ids("label")
        return self._known_labels()[ids.index(token)] if token in ids else None

    def _said_caption(self, ids: Sequence[int]) -> str:
        own = self.parts.ids("caption")
        said = [own.index(token) if token in own else None for token in ids]
        return "" if self.captions is None else self.captions.decode(said)

    def pieces(self, ids: Sequence[int]) -> list[str | None]:
        """Each token as its number, None where it is hidden; captions as text."""
        mask = self.space.mask_id
        written = [None if token == mask else f"{token} " for token in ids]
        if "caption" in self.part_names:
            for place in range(*self.span("caption").indices(len(ids))):
                if ids[place] != mask:
                    written[place] = self._said_caption([ids[place]])
        return written

    def examples(
        self,
        data: Mapping[str, object] | PictureSource | Pictures | str,
        *,
        length: int | None = None,
        split: str = "train",
    ) -> PictureRows:
        """One row a picture of a split, "train", "validation", "holdout" or "all".

        Labels and the captions' tokenizer are learnt from the training split where they are
        not known. Only the training split has variants (`flip`, `shift`).
        """
        items: Pictures | Shards
        if isinstance(data, Pictures):
            source, items = PictureSource(source="given"), data
        else:
            source = PictureSource.of(data)
            items = self._opened(source)

        def part(side: str) -> Tensor:
            known = items.groups or len(items)
            index = split_index(known, side, source.holdout, source.validation)
            if len(index):
                return index
            raise DataError(
                f"the {side} split of {len(items)} pictures is empty at "
                f"holdout={source.holdout}, validation={source.validation}"
            )

        self._learn_names(items.labels, items.label_names)
        if self.captions and not self.captions.learnt:
            self._learn_captions(_captions(items, part("train")))
        index = part(split)
        own = self.own_labels(items.labels, items.label_names)
        labels = None if own is None else own[index]
        if isinstance(items, Shards):
            codes, digest = items.ids[index].flatten(1)[:, None].long(), items.digest
        else:
            chosen = items.at(index)
            seen = variants(chosen, source) if split == "train" else [chosen.pixels]
            codes = torch.stack([self.codes(pixels) for pixels in seen], 1)
            digest = digest_of(chosen)
        return self._rows(codes, labels, _captions(items, index), length, digest)

    def _opened(self, source: PictureSource) -> Pictures | Shards:
        """The source's pictures, or the tokens that this very codec made of them before."""
        if not any(holds_shards(path) for path in source.paths):
            return read_pictures(source, channels=self.codec.channels, size=self.size)
        if len(source.paths) > 1 or source.flip or source.shift:
            raise ConfigError("data.source of tokens is one folder, without flip and shift")
        stored = open_shards(source.paths[0], codec=self.codec)
        if stored.size != tuple(self.size):
            raise DataError(
                f"{source.source}: tokens of {stored.size[0]} x {stored.size[1]} pixels, this "
                f"model's have {self.size[0]} x {self.size[1]}"
            )
        return stored

    def _learn_names(self, labels: Tensor | None, names: list[str]) -> None:
        if self.label == "none":
            return
        if labels is None:
            raise DataError("the pictures have no labels: modality.label must be none")
        if self.labels is None:
            self.labels = [name.lower() for name in names]

    def own_labels(self, labels: Tensor | None, names: Sequence[str]) -> Tensor | None:
        """Labels (N,) int64 into `names` as this model's numbers: by name, where they have any.

        Numbers are taken to be the model's own. Raises DataError for a label that it lacks.
        """
        if self.label == "none" or labels is None:
            return labels
        known, given = self._known_labels(), [name.lower() for name in names]
        unknown = [name for name in given if name not in known]
        if not unknown:
            return torch.tensor([known.index(name) for name in given])[labels]
        if not all(name.isdigit() for name in given):
            raise DataError(f"unknown label {unknown[0]!r}; {nearest(unknown[0], known)}")
        if len(given) > len(known):
            raise DataError(f"label {len(given) - 1}: the model has {len(known)} labels")
        return labels

    def _learn_captions(self, captions: list[str] | None) -> None:
        if captions is None:
            raise DataError("the pictures have no captions: set data.captions")
        if self.captions:
            self.captions.learn(captions)

    def _rows(
        self, codes: Tensor, labels: Tensor | None, captions: list[str] | None,
        length: int | None, slice_sha256: str,
    ) -> PictureRows:  # fmt: skip
        """Canvases (N, variants, L) as examples."""
        count, versions = codes.shape[:2]
        parts = [codes]
        if self.label == "part":
            if labels is None:
                raise DataError("the pictures have no labels: modality.label must not be part")
            own = labels + self.parts.ids("label").start
            parts.append(own[:, None, None].expand(count, versions, 1))
        if self.captions:
            if captions is None:
                raise DataError("the pictures have no captions: set data.captions")
            told = torch.tensor([self.caption_ids(caption, cut=True) for caption in captions])
            parts.append(told[:, None].expand(count, versions, told.shape[1]))
        if length not in (None, self.length):
            raise ConfigError(f"data.length={length}: a canvas of this codec has {self.length}")
        units = self.size[0] * self.size[1] * (self.codec.channels if self.unit == "dim" else 1)
        return PictureRows(
            torch.cat(parts, 2),
            cond={"label": labels} if self.classes and labels is not None else {},
            unit=self.unit,
            units=1.0 if self.unit == "token" else units / self.length,
            slice_sha256=slice_sha256,
        )

    def sizes(self, items: Sequence[object]) -> dict[str, int]:
        """How many units the items have, beside their tokens."""
        pixels = len(items) * self.size[0] * self.size[1]
        if self.unit == "token":
            return {}
        return {"dim": pixels * self.codec.channels} if self.unit == "dim" else {"pixel": pixels}

    def config(self) -> dict[str, object]:
        """The settings that `image(**settings, folder=...)` takes back, with the name."""
        return {
            "name": self.name,
            "codec": self.codec.config(),
            "size": list(self.size),
            "labels": self.labels,
            "label": self.label,
            "caption": self.captions.config() if self.captions else None,
        }

    def save(self, folder: str | Path) -> None:
        """Write the codec and the captions' tokenizer, with `config()` as modality.json."""
        folder = Path(folder)
        save_codec(self.codec, folder)
        if self.captions:
            self.captions.save(folder)
        settings = json.dumps(self.config(), indent=1, ensure_ascii=False)
        (folder / SETTINGS).write_text(settings + "\n", encoding="utf-8")


def image(
    *,
    codec: Mapping[str, Any] | str | Codec,
    size: Sequence[int],
    labels: Sequence[str] | None = None,
    label: str = "none",
    caption: Mapping[str, int] | None = None,
    folder: str | Path | None = None,
) -> ImageModality:
    """The picture modality.

    `codec`: a folder that holds one, a description {"name": "levels", ...}, or a Codec. `size`
    (H, W) pixels. `labels` are the names, by number, learnt from the data where not given.
    `label`: "none"; "condition", which the backbone is told of and guidance leaves out; or
    "part", one place of the canvas. `caption` {"length": places, "vocab_size": ids} makes the
    caption a part. `folder` is where `save` wrote.

    Raises ConfigError for options that do not go together.

    >>> image(codec={"name": "levels"}, size=[8, 8]).grid
    (8, 8)
    """
    if label not in LABELS:
        raise ConfigError(f"modality.label={label!r}; {nearest(str(label), LABELS)}")
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ConfigError(f"modality.size={size!r}: expected two whole numbers, height and width")
    if labels is not None:
        labels = [str(name).lower() for name in labels]
        if not labels or len(set(labels)) != len(labels):
            raise ConfigError("modality.labels: expected different names, at least one")
    captions = None if caption is None else Captions.of(caption, folder)
    made = _codec(codec, folder)
    if any(side % made.stride for side in sides):
        raise ConfigError(f"modality.size={sides}: the codec's places have {made.stride} pixels")
    return ImageModality(
        made, size=(sides[0], sides[1]), labels=labels, label=label, captions=captions
    )


def image_modality(modality: Modality) -> ImageModality:
    """The modality as one of images; ConfigError where it is another."""
    if not isinstance(modality, ImageModality):
        raise ConfigError(f"this is a model of {modality.name}, not of pictures")
    return modality


def _captions(items: Pictures | Shards, index: Tensor) -> list[str] | None:
    """The captions of the items numbered `index`, or None."""
    return items.captions and [items.captions[i] for i in index.tolist()]


def _codec(codec: Any, folder: str | Path | None) -> Any:
    """The codec, read from `folder` where a saved model lies there."""
    if not isinstance(codec, str | Path | Mapping):
        return codec
    if folder is None:
        return make_codec(codec)
    described = read_json(Path(folder) / "codec.json")
    if described != codec:
        raise CheckpointError(f"{folder}: codec.json and the modality's codec are not the same")
    return load_codec(folder)
