"""Damaged pictures of every format: loaded or refused, and no program is started."""

import json
import random
import struct

import pytest
from PIL import Image
from written_pictures import STARTED, WRITTEN, content, noise, watch_programs, written

from mdiff.errors import DataError
from mdiff.modalities.image.data.images import read_pictures
from mdiff.modalities.image.data.pixels import as_array, decoded, open_picture


def damaged(raw, random_):
    """The content with one of the ways in which files go bad."""
    raw = bytearray(raw)
    how = random_.randrange(5)
    if how == 0:
        return bytes(raw[: random_.randrange(len(raw))])
    if how == 1:
        at = random_.randrange(len(raw))
        return bytes(raw[:at] + raw[at + random_.randint(1, 64) :])
    if how == 2:
        at = random_.randrange(len(raw))
        return bytes(raw[:at] + random_.randbytes(random_.randint(1, 64)) + raw[at:])
    # The head says sizes and offsets: half of the changes are there.
    span = min(len(raw), 128) if how == 3 else len(raw)
    for _ in range(random_.randint(1, 8)):
        raw[random_.randrange(span)] = random_.choice(
            [0, 1, 0x7F, 0x80, 0xFF, random_.randrange(256)]
        )
    return bytes(raw)


def load_or_refuse(forms, each):
    """How many of `each` damaged files a format were loaded; any other error is raised."""
    watch_programs()
    loaded, unnamed = 0, []
    for form in forms:
        raw = written(form)
        for number in range(each):
            bad = damaged(raw, random.Random(f"{form} {number}"))
            try:
                as_array(decoded(bad, "x.png"), channels=3)
                loaded += 1
            except DataError as error:
                if not str(error).startswith("x.png"):
                    unnamed.append((form, number, str(error)))
    assert unnamed == []
    assert STARTED == ["watched"]
    return loaded


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_of_every_format_are_loaded_or_refused():
    assert 0 < load_or_refuse(WRITTEN, 20) < 20 * len(WRITTEN)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_forty_two_thousand_damaged_pictures_are_loaded_or_refused():
    load_or_refuse(WRITTEN, 42_000 // len(WRITTEN) + 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"\0", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0\x08\0\0\0", b"BM" * 9,
        b"P6 8 8 255\n", b"P6 99999 99999 255\n", b"RIFF\0\0\0\0WEBPVP8 ", b"P7\n",
        b"\0\0\0\x1cftypavif" + bytes(40),
        b"DDS " + struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0) + bytes(44)
        + struct.pack("<8I", 32, 0, 0, 0, 0, 0, 0, 0) + bytes(320),
    ],
)  # fmt: skip
def test_files_of_a_head_alone_are_refused(tmp_path, raw):
    (tmp_path / "x.jpg").write_bytes(raw)
    with pytest.raises(DataError, match=r"x\.jpg"):
        open_picture(tmp_path / "x.jpg")


def test_what_a_decoder_raises_is_a_data_error_but_for_memory(monkeypatch):
    raw = content(Image.fromarray(noise()), "PNG")
    for error, expected in (
        (RuntimeError("bad"), DataError), (KeyError("x"), DataError), (RecursionError(), DataError),
        (AssertionError(), DataError), (MemoryError(), MemoryError),
    ):  # fmt: skip

        def load(self, error=error):
            raise error

        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
        with pytest.raises(expected):
            decoded(raw, "x")


def test_a_bad_file_among_good_ones_is_a_problem_of_its_own(tmp_path):
    for form in ("PNG", "AVIF", "TIFF", "DDS"):
        (tmp_path / f"{form}.jpg").write_bytes(written(form))
    (tmp_path / "cut.avif").write_bytes(written("AVIF")[:-200])
    found = read_pictures({"source": str(tmp_path)}, channels=3, strict=False)
    assert found.names == ["AVIF.jpg", "PNG.jpg", "TIFF.jpg"]
    assert len(found.problems) == 2
    assert json.dumps(found.problems)
