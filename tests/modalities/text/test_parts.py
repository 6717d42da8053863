"""Text decoded in parts: joined, the parts are the text, for every kind of tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tokenizer_kinds import KINDS, SAMPLES, saved
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdiff.modalities.text.modality import Text, text
from mdiff.modalities.text.tokenizers import text_pieces

GENERATED = 2000
# Tokenizers that give back what they are given, but for a space at the start of a text.
EXACT = ("byte_level", "byte_level_prefix", "byte_fallback", "legacy_llama")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Text]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {kind: text(tokenizer=str(saved(kind, folder / kind))) for kind in KINDS}
    return found | {"byte": text(), "bpe": text(tokenizer="bpe", vocab_size=300).fit([*SAMPLES])}


def joined(pieces: list[str | None]) -> str:
    return "".join(piece or "" for piece in pieces)


def assert_in_parts(modality: Text, ids: list[int]) -> None:
    for whole in (False, True):
        pieces = modality.pieces(ids, whole=whole)
        assert joined(pieces) == modality.decode(ids, whole=whole)
        assert [piece is None for piece in pieces] == [i == modality.mask_id for i in ids]


@pytest.mark.parametrize("kind", [*KINDS, "byte", "bpe"])
def test_the_pieces_of_a_text_are_the_text(made: dict[str, Text], kind: str) -> None:
    modality = made[kind]
    for sample in SAMPLES:
        ids = modality.encode(sample)
        assert_in_parts(modality, ids)
        for at in range(len(ids) + 1):
            assert_in_parts(modality, [*ids[:at], modality.mask_id, *ids[at:]])
        assert_in_parts(modality, [modality.mask_id, *ids[1:]])


def test_behind_a_long_run_without_text_each_id_has_its_own_again() -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    ids = [0] * 20 + [ord(letter) for letter in letters]
    pieces = text_pieces(lambda some: "".join(chr(i) for i in some if i), ids)
    # A run of more than FEW is tried at powers of two: 32 ids are 20 without text and 12 with.
    assert pieces == [""] * 31 + [letters[:12], *letters[12:]]


@pytest.mark.parametrize("kind", EXACT)
def test_characters_of_several_tokens_appear_with_their_last_byte(
    made: dict[str, Text], kind: str
) -> None:
    modality = made[kind]
    ids = modality.encode("caf\u00ea 漢字 😀!")
    pieces = modality.pieces(ids)
    assert "\ufffd" not in joined(pieces)
    # No character waits for another: at most the four of an emoji and the space before it.
    assert all(len(piece or "") <= 2 for piece in pieces[3:])
    assert joined(pieces).strip() == "caf\u00ea 漢字 😀!"


def test_a_gap_ends_a_run_of_bytes(made: dict[str, Text]) -> None:
    assert text().pieces([0xC3, 256, 0xA9]) == ["\ufffd", None, "\ufffd"]
    assert text().decode([0xC3, 256, 0xA9]) == "\ufffd\ufffd"
    for kind in EXACT:
        modality = made[kind]
        first, *rest = [i for i in modality.encode("x漢") if i not in modality.encode("x")]
        ids = [*modality.encode("x"), first, modality.mask_id, *rest]
        assert "漢" not in modality.decode(ids)
        assert "\ufffd" in modality.decode(ids)


def test_an_end_between_bytes_ends_their_run() -> None:
    modality = text(eos=True)
    ids = [0xC3, 256, 0xA9]
    assert modality.decode(ids, whole=True) == "\ufffd\ufffd"
    assert modality.pieces(ids, whole=True) == ["\ufffd", "", "\ufffd"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_work_grows_with_the_length(
    made: dict[str, Text], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modality = made[kind]
    inner = modality.tokenizer.inner  # type: ignore[attr-defined]
    plain, work = inner.decode, [0, 0]

    def counted(ids: list[int], **options: bool) -> str:
        work[0] += 1
        work[1] += len(ids)
        return plain(ids, **options)

    monkeypatch.setattr(inner, "decode", counted)
    random_ = random.Random(0)
    drawn = [random_.randrange(len(inner)) for _ in range(400)]
    # Bytes that never become a character, and ids without any text.
    for row in (modality.encode(" ".join(SAMPLES)) * 4, drawn, [7] * 400, [modality.eos_id] * 400):
        found = []
        for length in (200, 400):
            work[:] = [0, 0]
            modality.pieces(row[:length], whole=True)
            found.append(list(work))
        for short, long in zip(*found):
            assert long <= 2.6 * short + 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_gives_what_the_text_gives_with_nothing_at_a_gap(
    made: dict[str, Text], kind: str
) -> None:
    modality = made[kind]
    for template in ("f([MASK:2])", "the [MASK] moon", "the[MASK:3], cats", "[MASK]the", "t[MASK]"):
        shown = modality.decode(modality.template(template))
        around = template.replace("[MASK:2]", "").replace("[MASK:3]", "").replace("[MASK]", "")
        if kind not in ("word_piece", "word_level", "bpe_suffix"):
            # Some tokenizers put a space before a text; behind a gap none does.
            assert shown.removeprefix(" ") == around


def test_a_vocabulary_of_words_has_no_space_behind_a_gap(tmp_path: Path) -> None:
    names = ["<unk>", "▁f(", "▁)", ")", "▁x"]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.decoder = decoders.Metaspace(prepend_scheme="always")
    words = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", mask_token="<mask>"
    )  # fmt: skip
    words.save_pretrained(tmp_path)
    modality = text(tokenizer=str(tmp_path))
    canvas = modality.template("f([MASK:2])")
    assert canvas == [1, 5, 5, 3]
    assert modality.decode([token for token in canvas if token != modality.mask_id]) == "f()"
    assert modality.decode(modality.template("f([MASK]) x")) == "f() x"


def test_word_pieces_go_on_inside_a_word(made: dict[str, Text]) -> None:
    modality = made["word_piece"]
    canvas = modality.template("the moon[MASK]s")
    assert modality.decode(canvas).endswith("moons")
    assert modality.template("the [MASK] moon")[-1:] == modality.encode("moon")[-1:]


def text_of(random_: random.Random) -> str:
    alphabet = [*"abcxyz ().,'\n", *SAMPLES, "é", "漢", "👩‍👧", "\u0301", "\ufffd", "ﬀ", "\u2028"]
    return "".join(random_.choice(alphabet) for _ in range(random_.randrange(1, 14)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "byte", "bpe"])
def test_generated_rows_in_parts(made: dict[str, Text], kind: str) -> None:
    modality, random_ = made[kind], random.Random(kind)
    size = modality.tokenizer.size
    for number in range(GENERATED):
        if number % 2:
            ids = [random_.randrange(size) for _ in range(random_.randrange(1, 40))]
        else:
            ids = modality.encode(text_of(random_))
        ids = [modality.mask_id if random_.random() < 0.1 else i for i in ids]
        assert_in_parts(modality, ids)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generated_templates_keep_what_is_given(made: dict[str, Text], kind: str) -> None:
    modality, random_ = made[kind], random.Random(kind)
    for _ in range(GENERATED):
        parts = [text_of(random_) for _ in range(random_.randrange(2, 4))]
        canvas = modality.template("[MASK:2]".join(parts))
        assert_in_parts(modality, canvas)
        assert canvas.count(modality.mask_id) == 2 * (len(parts) - 1)
        if kind in EXACT:
            # The start of a text may lose or get a space; behind a gap nothing changes.
            shown, given = modality.decode(canvas), "".join(parts)
            assert shown in (given, given.removeprefix(" "), f" {given}")
