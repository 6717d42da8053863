"""What live views, films and pages show of tokens that are taken back or rewritten."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_text import tiny

import mdiff
from mdiff.cli.views import live
from mdiff.cli.views.gif import Film, write_gif
from mdiff.cli.views.revisions import REWRITTEN, TAKEN_BACK, Revisions
from mdiff.cli.views.trace import Position, Recorder, Stint, _joined
from mdiff.modalities.image.modality import image
from mdiff.pipeline.pipeline import Pipeline

MASK = 9
REVISING = [
    ("remdm", {"steps": 24, "eta": 0.2}), ("psi", {"steps": 24, "kappa": 0.5}),
    ("gibbs", {"sweeps": 2.0}), ("path_planning", {"steps": 12}),
    ("edit", {"threshold": 0.0, "edit_threshold": 0.0}),
    ("blocks", {"inner": "remdm", "block_length": 8, "steps": 12}),
]  # fmt: skip
PLAIN = [("first_hitting", {}), ("confidence", {"steps": 5}), ("blocks", {"block_length": 8})]


def text_run(name, options, **more):
    """Two samples of 16 tokens, the first of which begins with two given ones."""
    pipeline = tiny()
    canvases = pipeline.canvases("ab", length=16) + pipeline.canvases("", length=13)
    (run,) = pipeline.runs(canvases, sampler=name, seed=4, **options, **more)
    return run


def pictures(name, options, seed=4):
    """A film and the samples of two pictures of 4 x 4 positions, by random logits."""
    modality = image(codec={"name": "levels", "levels": 4, "step": 60}, size=[4, 4])
    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    denoiser = mdiff.from_logits(lambda tokens: table[tokens.roll(1, 1)])
    pipeline = Pipeline(denoiser, modality.space, modality, window=16)
    canvases = pipeline.canvases(num_samples=2)
    (run,) = pipeline.runs(canvases, sampler=name, seed=seed, **options)
    film = Film(modality)
    reel = film.reel(run.canvas, lambda row, picture: picture)
    for state in run:
        reel.add(state.tokens)
    return film, run.finished()


def test_taken_back_is_what_held_a_token_and_rewritten_what_holds_another():
    canvas = torch.tensor([[MASK, MASK, 5, MASK]])
    revisions = Revisions(canvas, MASK)
    steps = [
        # The tokens; which are hidden again; which hold another token than they did.
        ([1, MASK, 5, MASK], [0, 0, 0, 0], [0, 0, 0, 0]),
        ([MASK, 2, 6, MASK], [1, 0, 0, 0], [0, 0, 1, 0]),
        ([MASK, 3, 6, 4], [1, 0, 0, 0], [0, 1, 0, 0]),
        ([1, 3, MASK, 4], [0, 0, 1, 0], [0, 0, 0, 0]),
        ([7, MASK, 5, 4], [0, 1, 0, 0], [1, 0, 1, 0]),
    ]
    for tokens, again, other in steps:
        back, rewritten = revisions.add(torch.tensor([tokens]))
        assert (back[0].int().tolist(), rewritten[0].int().tolist()) == (again, other)


@pytest.mark.parametrize(("name", "options"), [*REVISING, *PLAIN])
def test_a_page_replays_every_state(name, options):
    run = text_run(name, options)
    recorder, shown, before = Recorder(run), [[], []], run.canvas
    for state in run:
        recorder.add(state)
        for row in range(2):
            if bool(((state.tokens != before) | state.revealed)[row].any()):
                shown[row].append(run.pieces(row))
        before = state.tokens
    samples = run.finished()
    taken_back = 0
    for row, record in enumerate(recorder.records(["", ""])):
        assert record.steps == len(shown[row])
        taken_back += sum(map(len, record.past))
        for now, expected in enumerate(shown[row], start=1):
            found = [
                piece if step <= now
                else next((held for held, first, last in past if first <= now < last), None)
                for piece, step, past in zip(
                    record.pieces, record.step, record.past or [()] * len(record.pieces)
                )
            ]  # fmt: skip
            assert [piece is None for piece in found] == [piece is None for piece in expected]
            if now == record.steps:
                assert found == expected
        for position, past in enumerate(record.past):
            for piece, _, last in past:
                assert shown[row][last - 2][position] == piece
        assert record.times == list(samples[row].writing.times)
        assert record.entropy == pytest.approx(samples[row].writing.entropy, abs=1e-3)
    assert (taken_back > 0) == ((name, options) in REVISING)


def test_a_position_of_several_codes_is_there_while_all_of_them_are():
    one = Position("", 9, -1.0, 0.5, 0.25, 3, (Stint("", 1, 4), Stint("", 5, 8)))
    two = Position("", 6, -2.0, 0.5, 0.5, 2, (Stint("", 3, 6),))
    joined = _joined([one, two])
    assert joined.past == (Stint("", 3, 4), Stint("", 5, 6), Stint("", 6, 8))
    assert joined._replace(past=()) == Position("", 9, -3.0, 1.0, 0.25, 3)
    assert _joined([two._replace(past=())] * 2).past == ()


@pytest.mark.parametrize(("name", "options"), [*REVISING[:3], *PLAIN[:2]])
def test_a_film_marks_what_is_taken_back_and_ends_without_marks(name, options, tmp_path):
    film, samples = pictures(name, options)
    frames = film.frames()
    revises = (name, options) in REVISING
    assert film.is_marked == revises
    colours = (TAKEN_BACK,) if film.is_marked else ()
    write_gif(frames, tmp_path / "x.gif", scale=1, colours=colours)
    looks = []
    with Image.open(tmp_path / "x.gif") as made:
        for number in range(made.n_frames):
            made.seek(number)
            looks.append(np.array(made.convert("RGB")).reshape(-1, 3))
    hidden_again = [int((frame == TAKEN_BACK).all(1).sum()) for frame in looks]
    coloured = [int((np.ptp(frame.astype(int), axis=1) > 20).sum()) for frame in looks]
    assert coloured[0] == coloured[-1] == 0
    assert (max(coloured) > 0) == revises
    assert (max(hidden_again) > 0) == (name in ("remdm", "psi"))
    assert len(samples) == 2


@pytest.mark.parametrize(("name", "options"), [*REVISING, *PLAIN])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_live_view_marks_what_is_taken_back(name, options, terminal, monkeypatch):
    run, shown = text_run(name, options), io.StringIO()
    monkeypatch.setattr(live, "message", lambda text: shown.write(text + "\n"))
    if terminal:
        console = Console(file=shown, force_terminal=True, color_system="truecolor", width=80)
        states = list(live._redrawn(run, console))
    else:
        states = list(live._printed(run))
    written = shown.getvalue()
    back, other = (";".join(map(str, rgb)) for rgb in (TAKEN_BACK, REWRITTEN))
    again = any(bool(state.hidden_again[0].any()) for state in states)
    revises = (name, options) in REVISING
    assert again == (revises and name not in ("gibbs", "edit"))
    if terminal:
        # Frames are drawn at most so often a second: what was rewritten stays marked to the end.
        assert (f"38;2;{other}" in written) == revises
        assert revises or f"38;2;{back}" not in written
        return
    assert (" rewritten]" in written) == revises
    assert (" taken back" in written) == again
    # A snapshot shows those that are hidden at the time.
    assert ("▒" in written) <= again
    assert ("▒" in written) or name not in ("remdm", "psi")
    plain = [line for line in written.splitlines() if line.startswith("[")]
    if not revises:
        assert all(re.match(r"\[\d+/14\] ", line) for line in plain)
    assert not written or plain[-1].startswith("[14/14")
