"""What the names of emoji files say: code points, a caption, and the base of its variants."""

import re
import unicodedata

from mdiff.errors import DataError

NAME = re.compile(r"(?:emoji_)?u?((?:[0-9a-f]{4,6})(?:_(?:[0-9a-f]{2,6}))*)", re.I)
JOINERS = {0x200D, 0xFE0F, 0xFE0E}
TONES = range(0x1F3FB, 0x1F400)
# Signs that make a variant of the same picture: female, male.
GENDERS = {0x2640, 0x2642}
PEOPLE = {0x1F468, 0x1F469, 0x1F9D1}
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
# Letters of sequences that spell a region after a black flag.
TAG_LETTERS = range(0xE0020, 0xE0080)


def code_points(name: str) -> list[int]:
    """The code points of a file name such as "emoji_u1f600" or "1f468_200d_1f4bb".

    Raises DataError for a name that has none.

    >>> [hex(point) for point in code_points("emoji_u0023_20e3")]
    ['0x23', '0x20e3']
    """
    stem = name.rpartition("/")[2].partition(".")[0]
    found = NAME.fullmatch(stem)
    if found is None:
        raise DataError(f"{name!r} does not name code points: expected such as emoji_u1f600")
    return [int(part, 16) for part in found[1].split("_")]


def caption_of(name: str) -> str:
    """The code points' Unicode names, lower case; joiners and variation selectors left out.

    >>> caption_of("emoji_u1f600")
    'grinning face'
    """
    words: list[str] = []
    for point in code_points(name):
        if point in JOINERS:
            continue
        if point in FLAG_LETTERS:
            letter = chr(ord("a") + point - FLAG_LETTERS.start)
            words.append(letter if words else f"flag {letter}")
        elif point in TAG_LETTERS:
            words.append(chr(point - 0xE0000) if point < 0xE007F else "")
        else:
            words.append(unicodedata.name(chr(point), f"u{point:x}").lower())
    return " ".join(word for word in words if word).replace("emoji modifier fitzpatrick ", "skin ")


def base_of(name: str) -> str:
    """What the variants of one picture share: the code points without skin tones and genders.

    >>> base_of("emoji_u1f469_1f3fd_200d_1f4bb") == base_of("emoji_u1f468_200d_1f4bb")
    True
    """
    kept = []
    for point in code_points(name):
        if point in JOINERS or point in TONES or point in GENDERS:
            continue
        kept.append("person" if point in PEOPLE else f"{point:x}")
    return "_".join(kept)
