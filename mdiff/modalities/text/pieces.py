"""Decoded text in parts: what each id adds to it, for any decoder, in linear time."""

import codecs
from collections.abc import Callable, Sequence

# So many ids without a text of their own are tried at each, longer runs at powers of two alone.
FEW = 8


def text_pieces(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], *, behind: Sequence[int] = ()
) -> list[str]:
    """The text that each id adds behind the ids `behind`; joined, `decoded(decode, ids)`.

    A character cut between ids appears with the last of them. Every part is compared with the
    whole text: where decoding a stretch alone gives another text, the ids wait for later ones.
    The ids that are decoded are at most a constant times those given.

    >>> text_pieces(lambda ids: bytes(ids).decode(errors="replace"), [195, 169, 97])
    ['', 'é', 'a']
    """
    found = [""] * len(ids)
    if not ids:
        return found
    whole, row = decoded(decode, ids, behind=behind), [*behind, *ids]
    # The text of row[context:read] is `known`; `at` characters of the whole text have an id.
    context, read, at, known = 0, len(behind), 0, decode(behind)
    for end in range(read + 1, len(row) + 1):
        waiting = end - read
        if waiting > FEW and waiting & (waiting - 1):
            continue
        text = decode(row[context:end])
        new = text[len(known) :]
        if new and text.startswith(known) and whole.startswith(new, at):
            found[end - 1 - len(behind)] = new
            context, read, at = read, end, at + len(new)
            known = decode(row[context:read])
    found[-1] += whole[at:]
    return found


def decoded(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], *, behind: Sequence[int] = ()
) -> str:
    """The text of ids that stand behind others, whose own text is left out.

    Decoders drop a space at the start of a text, and some join words with one: what is inside
    a text is decoded behind something.
    """
    before, text = decode(behind), decode([*behind, *ids])
    return text[len(before) :] if text.startswith(before) else decode(ids)


def utf8_pieces(parts: Sequence[bytes]) -> list[str]:
    """The text that each run of bytes completes; joined, the text of them all."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return [decoder.decode(part, final=i == len(parts)) for i, part in enumerate(parts, start=1)]
