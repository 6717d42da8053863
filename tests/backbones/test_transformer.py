"""Our backbones: what they compute, how they are saved, and what they refuse."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mdiff.backbones.bit_transformer import bit_transformer
from mdiff.backbones.layers.attention import rotary_tables, rotate
from mdiff.backbones.transformer import Transformer, transformer
from mdiff.denoiser import Denoiser
from mdiff.errors import ConfigError
from mdiff.files import read_model_files
from mdiff.pipeline.published import built, filled, own_backbone

SMALL = {"vocab_size": 11, "width": 32, "depth": 2, "heads": 2}
# Twelve tokens on six positions.
BITS = {"bits": 6, "groups": 2, "grid": [2, 3]}
TOLERANCE = 1e-5

SHAPES = [
    {},
    {"tie": True},
    {"tie": True, "mask_id": 3},
    {"grid": [3, 4]},
    {"qk_norm": False, "mlp_width": 20},
    {"uses_time": True},
    {"classes": 4},
    {"uses_time": True, "classes": 4, "causal": True},
    BITS,
    BITS | {"embedding": "table", "uses_time": True, "classes": 4},
    BITS | {"groups": 3, "mask_vector": True, "qk_norm": False},
]
both = pytest.mark.parametrize("options", [{}, BITS], ids=["tokens", "bits"])


def fresh(**options: object) -> Transformer:
    """A small model of these options; with `bits` the one that reads bits."""
    torch.manual_seed(0)
    if "bits" not in options:
        return transformer(**{**SMALL, **options})
    return bit_transformer(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, **options)


def randomised(**options: object) -> Transformer:
    """A small model whose weights, the zero ones too, are large enough to matter."""
    model = fresh(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def canvas(rows: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL["vocab_size"], (rows, length), generator=generator)
    tokens[:, ::3] = SMALL["vocab_size"]
    return tokens


def canvas_of(model: Transformer, rows: int = 2, length: int = 12) -> Tensor:
    """`canvas` in the ids of a model."""
    tokens, config = canvas(rows, length), model.config
    return torch.where(tokens == 11, config.mask_id, tokens % config.vocab_size)


def conds(options: dict[str, object], rows: int = 2) -> dict[str, object]:
    """The time and the label that a model of these options wants."""
    extra: dict[str, object] = {}
    if options.get("uses_time"):
        extra["t"] = torch.linspace(0.2, 0.9, rows)
    if options.get("classes"):
        extra["cond"] = {"label": torch.arange(rows)}
    return extra


@pytest.mark.parametrize("options", SHAPES)
def test_the_weights_are_counted_before_they_are_allocated(options):
    model = fresh(**options)
    assert model.config.parameter_count == sum(p.numel() for p in model.parameters())
    assert isinstance(model, Denoiser)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def again(folder: Path) -> Transformer:
    """The model of a folder that `save_pretrained` wrote."""
    files = read_model_files(folder)
    name = own_backbone(files)
    return filled(built(name, files.config), files).eval()


@pytest.mark.parametrize("options", SHAPES)
def test_a_saved_model_gives_the_same_bits(options, tmp_path):
    model = randomised(**options)
    model.save_pretrained(tmp_path)
    loaded = again(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    tokens = canvas_of(model)
    assert torch.equal(loaded(tokens, **conds(options)), model(tokens, **conds(options)))


def test_a_sharded_save_loads_to_the_same_bits(tmp_path):
    model = randomised(depth=3)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = again(tmp_path)
    assert torch.equal(loaded(canvas()), model(canvas()))


@pytest.mark.parametrize("options", SHAPES)
def test_at_selects_rows_and_the_head_reads_only_those(options):
    model = randomised(**options)
    tokens = canvas_of(model)
    at = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    shapes = []
    model.head.register_forward_hook(lambda _, given, __: shapes.append(given[0].shape))
    chosen = model(tokens, at=at, **conds(options))
    assert shapes == [(int(at.sum()), model.head.in_features)]
    whole = model(tokens, **conds(options))
    assert whole.shape == (*tokens.shape, model.config.vocab_size)
    torch.testing.assert_close(chosen, whole[at], atol=TOLERANCE, rtol=0)
    features = model.features(tokens, at=at, **conds(options))
    assert torch.equal(model.head(features), chosen)
    nowhere = model(tokens, at=torch.zeros_like(at), **conds(options))
    assert nowhere.shape == (0, model.config.vocab_size)


@pytest.mark.parametrize("options", SHAPES)
def test_a_row_gets_the_logits_that_it_gets_alone(options):
    model = randomised(**options).double()
    tokens = canvas_of(model, 3)
    extra = conds(options, 3)
    whole = model(tokens, **extra)
    for row in range(3):
        own = {name: value[row : row + 1] for name, value in extra.items() if name == "t"}
        if "cond" in extra:
            own["cond"] = {"label": extra["cond"]["label"][row : row + 1]}
        alone = model(tokens[row : row + 1], **own)
        torch.testing.assert_close(alone[0], whole[row], atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "options", [{}, {"grid": [3, 4]}, {"causal": True}, BITS | {"grid": [13, 1]}]
)
def test_padding_on_either_side_or_inside_changes_nothing(options):
    model = randomised(**options)
    each = options.get("groups", 1)
    alone = canvas_of(model, 1, 8 * each)
    expected = model(alone)[0]
    positions = {
        "right": range(8),
        "left": range(5, 13),
        "inside": [0, 1, 4, 5, 6, 9, 10, 12],
    }
    tokens = torch.full((3, 13, each), 7)
    valid = torch.zeros(3, 13, each, dtype=torch.bool)
    for row, where in enumerate(positions.values()):
        tokens[row, list(where)] = alone[0].view(8, each)
        valid[row, list(where)] = True
    tokens, valid = tokens.flatten(1), valid.flatten(1)
    logits = model(tokens, valid=valid)
    assert bool(logits.isfinite().all())
    for row, name in enumerate(positions):
        torch.testing.assert_close(
            logits[row][valid[row]], expected, atol=TOLERANCE, rtol=0, msg=name
        )
    everything = model(alone, valid=torch.ones_like(alone, dtype=torch.bool))
    torch.testing.assert_close(everything[0], expected, atol=TOLERANCE, rtol=0)


@both
def test_a_row_of_nothing_but_padding_makes_no_nan(options):
    model = randomised(**options)
    valid = torch.tensor([[True], [False]]).expand(2, 12)
    logits = model(canvas_of(model), valid=valid)
    logits[valid].sum().backward()
    assert bool(logits.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"grid": [2, 4]}, {"causal": True}, BITS | {"grid": [17, 1]}]
)
def test_a_packed_document_gets_the_logits_that_it_gets_alone(options):
    model = randomised(**options)
    each = options.get("groups", 1)
    lengths = [5 * each, 7 * each, 3 * each]
    kept = sum(lengths)
    packed = canvas_of(model, 1, kept + 2 * each)
    documents = torch.tensor([4, 1, 9, 9]).repeat_interleave(torch.tensor([*lengths, 2 * each]))
    documents, valid = documents[None], torch.arange(kept + 2 * each)[None] < kept
    logits = model(packed, documents=documents, valid=valid)[0]
    parts = zip(packed[0, :kept].split(lengths), logits[:kept].split(lengths), strict=True)
    for alone, part in parts:
        torch.testing.assert_close(part, model(alone[None])[0], atol=TOLERANCE, rtol=0)
    unpadded = model(packed[:, :kept], documents=documents[:, :kept])[0]
    torch.testing.assert_close(unpadded, logits[:kept], atol=TOLERANCE, rtol=0)
    mixed = model(packed[:, :kept])[0]
    assert not torch.allclose(mixed, logits[:kept], atol=1e-2)


def test_interleaved_documents_do_not_see_each_other():
    model = randomised()
    first, second = canvas(1, 6, 1), canvas(1, 6, 2)
    packed = torch.stack([first, second], 2).flatten(1)
    documents = torch.tensor([[0, 1] * 6])
    logits = model(packed, documents=documents)[0]
    torch.testing.assert_close(logits[::2], model(first)[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits[1::2], model(second)[0], atol=TOLERANCE, rtol=0)


def test_a_causal_model_does_not_see_what_comes_after():
    model = randomised(causal=True)
    tokens = canvas()
    changed = tokens.clone()
    changed[:, 7] = 5
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])
    assert not torch.equal(randomised()(tokens)[:, 0], randomised()(changed)[:, 0])


def test_rotation_makes_attention_depend_on_offsets_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator)

    def score(a: int, b: int, grid: tuple[int, int] | None) -> float:
        cos, sin = rotary_tables(torch.tensor([a, b]), 8, grid=grid, base=10000.0)
        return float(rotate(query, cos[0], sin[0]) @ rotate(key, cos[1], sin[1]))

    assert score(2, 5, None) == pytest.approx(score(12, 15, None), abs=1e-5)
    # On a grid four wide, 1 and 6 are as far apart as 9 and 14: one row and one column.
    assert score(1, 6, (4, 4)) == pytest.approx(score(9, 14, (4, 4)), abs=1e-5)
    assert score(3, 4, (4, 4)) != pytest.approx(score(1, 2, (4, 4)), abs=1e-2)


def test_two_dimensional_positions_matter():
    tokens = canvas()
    outputs = [randomised(grid=grid)(tokens) for grid in (None, [3, 4], [4, 3])]
    for one, other in itertools.combinations(outputs, 2):
        assert not torch.allclose(one, other, atol=1e-2)
    tall, twice = randomised(grid=[3, 4]), randomised(grid=[6, 4])
    assert torch.equal(tall(tokens), twice(tokens))


@both
def test_the_time_and_the_label_have_an_effect(options):
    model = randomised(uses_time=True, classes=3, **options)
    tokens = canvas_of(model)
    label = {"label": torch.tensor([0, 1])}
    early, late = torch.tensor([0.1, 0.1]), torch.tensor([0.9, 0.9])
    base = model(tokens, t=early, cond=label)
    assert not torch.allclose(base, model(tokens, t=late, cond=label), atol=1e-2)
    other = model(tokens, t=early, cond={"label": torch.tensor([0, 2])})
    torch.testing.assert_close(base[0], other[0], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(base[1], other[1], atol=1e-2)
    null = model(tokens, t=early, cond={"label": torch.tensor([3, 3])})
    assert torch.equal(model(tokens, t=early), null)


@both
def test_a_fresh_conditional_model_is_the_unconditional_one(options):
    plain = fresh(**options)
    conditional = fresh(**options, uses_time=True, classes=3)
    missing, unexpected = conditional.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    tokens = canvas_of(plain)
    assert torch.equal(conditional(tokens, t=torch.tensor([0.3, 0.6])), plain(tokens))


@pytest.mark.parametrize("options", SHAPES)
def test_the_gradient_reaches_every_weight(options):
    model = randomised(**options)
    tokens = canvas_of(model)
    model(tokens, at=tokens % 2 == 1, **conds(options)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert bool((parameter.grad != 0).any()), name


def test_branches_start_smaller_in_deep_models():
    torch.manual_seed(0)
    model = transformer(vocab_size=50, width=64, depth=8, heads=2)
    assert float(model.blocks[3].mlp.out.weight.detach().std()) == pytest.approx(0.005, rel=0.05)
    assert float(model.blocks[3].mlp.into.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


def test_dropout_follows_the_generator_and_sleeps_in_evaluation():
    model = randomised(dropout=0.5)
    tokens = canvas()
    still = model(tokens)
    assert torch.equal(still, model(tokens))
    model.train()
    torch.manual_seed(5)
    one = model(tokens)
    other = model(tokens)
    torch.manual_seed(5)
    assert torch.equal(model(tokens), one)
    assert not torch.allclose(one, other)


@both
def test_half_precision_stays_close_and_double_is_double(options):
    model = randomised(**options)
    tokens = canvas_of(model)
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens)
    half = randomised(**options).to(torch.bfloat16)(tokens)
    double = randomised(**options).double()(tokens)
    assert (mixed.dtype, half.dtype, double.dtype) == (torch.bfloat16,) * 2 + (torch.float64,)
    # bfloat16 keeps 8 bits: an error of 2^-8 of the logits' scale, a few layers deep.
    scale = float(expected.detach().std())
    for rough in (mixed, half):
        assert float((rough.float() - expected).detach().abs().max()) < 0.1 * scale
    torch.testing.assert_close(double.float(), expected, atol=1e-4, rtol=0)


def test_it_trains_through_distributed_data_parallel(tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    model, tokens = randomised(), canvas()
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        logits = DistributedDataParallel(model)(tokens, at=tokens == 11)
        logits.square().mean().backward()
    finally:
        distributed.destroy_process_group()
    assert logits.shape == (8, 11)
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "divisible"),
        ({"heads": 8, "grid": [2, 2], "width": 40}, "divisible"),
        ({"grid": [4]}, "h and w"),
        ({"grid": [4, 0]}, "at least 1"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"mask_id": 12}, "mask_id=12: expected 0 to 11"),
        ({"depth": -1}, "depth=-1"),
        ({"depth": 2.0}, "depth=2.0"),
        ({"width": True}, "width=True"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": "much"}, "expected a number"),
        ({"uses_time": 1}, "true or false"),
        ({"init_std": float("nan")}, "init_std=nan"),
        ({"widht": 32}, "did you mean 'width'"),
        ({"width": 2**30, "depth": 2**20}, "needs .* GiB"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        transformer(**{**SMALL, **options})


def test_calls_that_cannot_be_meant_are_refused():
    plain, timed, classy = randomised(), randomised(uses_time=True), randomised(classes=2)
    tokens = canvas()
    with pytest.raises(ConfigError, match="cache"):
        plain(tokens, cache={})
    with pytest.raises(ConfigError, match="call it with t="):
        timed(tokens)
    with pytest.raises(ConfigError, match="no condition"):
        plain(tokens, cond={"label": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(ConfigError, match=r"'colour'.*'label' alone"):
        classy(tokens, cond={"colour": torch.zeros(2)})


@pytest.mark.parametrize("build", [transformer, bit_transformer])
def test_an_unknown_option_is_answered_by_what_a_recipe_may_set(build):
    with pytest.raises(ConfigError, match="unknown option 'zzz'") as caught:
        build(zzz=1)
    offered = str(caught.value).split("known: ")[1].split(", ")
    assert {"width", "depth"} <= set(offered)
    assert not {"vocab_size", "mask_id", "max_length", "layout", "classes"} & set(offered)
