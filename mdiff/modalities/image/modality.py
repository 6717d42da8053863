"""Images: a codec's ids, with a label and a caption as further parts of the canvas if asked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image as Pillow
from torch import Tensor

from mdiff.errors import CheckpointError, ConfigError, DataError
from mdiff.files import read_json
from mdiff.modalities.image.canvas import ImageCanvas
from mdiff.modalities.image.captions import Captions, check_unicode, warn_of_cuts
from mdiff.modalities.image.codec import Codec, load_codec, make_codec, save_codec
from mdiff.modalities.image.codec_files import SETTINGS as CODEC_SETTINGS
from mdiff.modalities.image.data.examples import PictureRows, open_items, variants
from mdiff.modalities.image.data.images import Pictures, digest_of, read_pictures, split_of
from mdiff.modalities.image.data.pixels import as_array
from mdiff.modalities.image.data.source import PictureSource
from mdiff.modalities.image.data.token_shards import Shards
from mdiff.modalities.image.inpainting import (
    Edits,
    as_picture,
    hidden_share,
    pixel_mask,
    shown_pictures,
    touched,
)
from mdiff.modalities.image.labels import Labels
from mdiff.modalities.protocol import Modality

SETTINGS = "modality.json"


class ImageModality(ImageCanvas):
    """Images to tokens and back; see `image`."""

    name = "image"

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
        """The tokens (B, L) int64 of pictures (B, C, H, W) uint8."""
        return self.codec.encode(pictures).flatten(1)

    def encode(self, given: object) -> list[int]:
        """The canvas of an item in full: an image, or a mapping with every part."""
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
            canvas[self.span("label")] = [self.parts["label"].ids[self.label_id(asked["label"])]]
        if "caption" in asked and self.captions:
            caption = str(asked["caption"])
            canvas[self.span("caption")] = self._caption_ids(self.captions, caption)
        return canvas

    def condition(self, prompt: object = "") -> Mapping[str, int | Tensor]:
        """The label's number where labels are a condition; empty of an image alone."""
        asked = self._asked(prompt) if isinstance(prompt, str | Mapping) else {}
        if not self.classes or "label" not in asked:
            return {}
        return {"label": self.label_id(asked["label"])}

    def _asked(self, prompt: object) -> dict[str, object]:
        """What a prompt gives, by key; DataError where it is no prompt of this model."""
        if isinstance(prompt, str):
            prompt = {"caption": prompt} if prompt else {}
        if not isinstance(prompt, Mapping):
            raise DataError(
                f"prompt {prompt!r:.60}: expected a text or a mapping of {', '.join(self.takes)}"
            )
        for key in prompt:
            if key not in self.takes:
                raise DataError(f"this model takes no {key!r}; known: {', '.join(self.takes)}")
        if not isinstance(prompt.get("caption"), str | None):
            raise DataError(f"caption {prompt['caption']!r:.60}: expected a text")
        check_unicode(prompt.get("caption") or "")
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
        hidden = hidden_share(may, strength=strength, seeds=seeds)
        canvases = torch.where(hidden, self.space.mask_id, canvas).tolist()
        if not bool(hidden.any()):
            # Nothing is regenerated: not one pixel is to pass through the codec.
            return Edits(canvases, original, torch.zeros_like(region))
        return Edits(canvases, original, None if mask is None else region)

    def template(self, text: str) -> list[int]:
        """Refused: images have no gaps in a line of text."""
        raise ConfigError("this model fills in pictures: use edit, or generate with what is given")

    def decode(self, ids: Sequence[int]) -> Pillow.Image:
        """The image, masked positions grey; `info` holds the `described` parts that it has."""
        made = as_picture(self.shown(torch.tensor([ids], device="cpu"))[0])
        found = self.described(ids)._asdict()
        made.info.update({name: found[name] for name in found if name in self.part_names})
        return made

    def shown(self, tokens: Tensor) -> Tensor:
        """The pictures (B, C, H, W) uint8 of canvases (B, L), masked positions grey."""
        layout = (*self.latent_grid, self.codec.codes_per_position)
        codes = tokens[:, self.span("image")].reshape(-1, *layout)
        return shown_pictures(self.codec, codes, mask_id=self.space.mask_id)

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
            items = open_items(source, codec=self.codec, size=self.size)
        shares = {"holdout": source.holdout, "validation": source.validation}
        self._learn_labels(items)
        written = items.captions or []
        if self.captions and items.captions is None:
            raise DataError("the pictures have no captions: set data.captions")
        if self.captions and not self.captions.learnt:
            training = split_of(items, "train", **shares).tolist()
            self.captions.learn([written[i] for i in training])
        if length not in (None, self.length):
            raise ConfigError(f"data.length={length}: a canvas of this codec has {self.length}")
        index = split_of(items, split, **shares)
        own = self.own_labels(items.labels, items.label_names)
        labels = None if own is None else own[index]
        if split == "train" and self.label != "none" and own is not None and labels is not None:
            self.known_labels.check_training(labels, own, **shares)
        if isinstance(items, Shards):
            codes, digest = items.ids[index].flatten(1)[:, None].long(), items.digest
        else:
            chosen = items.at(index)
            names = None if self.label == "none" else items.label_names
            versions = variants(chosen, source, names) if split == "train" else [chosen.pixels]
            codes = torch.stack([self.codes(pixels) for pixels in versions], 1)
            digest = digest_of(chosen)
        captions = written and [written[i] for i in index.tolist()]
        return self._rows(codes, labels, captions, slice_sha256=digest)

    def _learn_labels(self, items: Pictures | Shards) -> None:
        """Take the names of the items' labels, unless they are known or labels have no role."""
        if self.label == "none":
            return
        if items.labels is None:
            raise DataError(
                "the pictures have no labels, which this model is to be given: name them by "
                "folders, metadata.jsonl or y, or train with modality.label: none"
            )
        if self._labels is None:
            self._labels = Labels.learnt(items.label_names)

    def _rows(
        self, codes: Tensor, labels: Tensor | None, captions: Sequence[str], *, slice_sha256: str
    ) -> PictureRows:
        """Codes (N, variants, L) with labels (N,) and captions as examples."""
        count, versions = codes.shape[:2]
        parts = [codes]
        if self.label == "part" and labels is not None:
            own = labels + self.parts["label"].ids.start
            parts.append(own[:, None, None].expand(count, versions, 1))
        if self.captions:
            warn_of_cuts(map(len, map(self.captions.words.encode, captions)), self.captions.length)
            ids = [self._caption_ids(self.captions, caption, cut=True) for caption in captions]
            parts.append(torch.tensor(ids)[:, None].expand(count, versions, len(ids[0])))
        units = self.size[0] * self.size[1] * (self.codec.channels if self.unit == "dim" else 1)
        return PictureRows(
            torch.cat(parts, 2),
            cond={"label": labels} if self.classes and labels is not None else {},
            unit=self.unit,
            units=1.0 if self.unit == "token" else units / self.length,
            slice_sha256=slice_sha256,
        )

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
    codec: Mapping[str, object] | str | Codec,
    size: Sequence[int],
    labels: Sequence[str] | None = None,
    label: str = "none",
    caption: Mapping[str, int] | None = None,
    folder: str | Path | None = None,
) -> ImageModality:
    """The image modality.

    `codec`: a folder that holds one, a description {"name": "levels", ...}, or a Codec. `size`
    (H, W) pixels. `labels` are the names, by number, learnt from the data where not given.
    `label`: "none"; "condition", a condition of the backbone that guidance leaves out; or
    "part", one position of the canvas. `caption` {"length": positions, "vocab_size": ids} makes
    the caption a part. `folder` is where `save` wrote.

    Raises ConfigError for options that do not go together.

    >>> image(codec={"name": "levels"}, size=[8, 8]).grid
    (8, 8)
    """
    known = None if labels is None else Labels.of(labels)
    sides = list(size) if isinstance(size, list | tuple) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ConfigError(f"modality.size={size!r}: expected two whole numbers, height and width")
    captions = None if caption is None else Captions.of(caption, folder)
    made = _codec(codec, folder)
    if any(side % made.stride for side in sides):
        raise ConfigError(
            f"modality.size={sides}: expected multiples of the codec's {made.stride} pixels"
        )
    return ImageModality(made, size=(sides[0], sides[1]), label=label, labels=known,
                         captions=captions)  # fmt: skip


def image_modality(modality: Modality) -> ImageModality:
    """The modality as one of images; ConfigError where it is another."""
    if not isinstance(modality, ImageModality):
        raise ConfigError(f"this is a model of {modality.name}, not of pictures")
    return modality


def _codec(codec: Mapping[str, object] | str | Path | Codec, folder: str | Path | None) -> Codec:
    """The codec, read from `folder` where a saved model lies there."""
    if not isinstance(codec, str | Path | Mapping):
        return codec
    if folder is None:
        return make_codec(codec)
    if read_json(Path(folder) / CODEC_SETTINGS) != codec:
        raise CheckpointError(
            f"{folder}: {CODEC_SETTINGS} and the modality's codec are not the same"
        )
    return load_codec(folder)
