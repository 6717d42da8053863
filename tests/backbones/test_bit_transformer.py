"""The transformer that reads bits: its bits, its groups, and that samplers take it as any other."""

from __future__ import annotations

import processes
import pytest
import torch
import torch.nn.functional as F
from folders import GOLDEN as GOLDEN_FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mdiff
from mdiff.backbones.bit_transformer import bit_transformer, signs
from mdiff.errors import ConfigError
from mdiff.find import find, names
from mdiff.objective.loss import masked_diffusion_loss
from mdiff.schedule import Cosine, Linear
from mdiff.tokens import TokenSpace

GOLDEN = GOLDEN_FOLDER / "maskbit_lfqbert.safetensors"
SMALL = {"grid": [3, 4], "bits": 6, "groups": 2, "width": 32, "depth": 2, "heads": 2}
SPACE = TokenSpace(8, mask_id=8)
LENGTH = 24


def model_of(**options):
    """A float64 model whose weights, but for a table's, are large enough to matter."""
    torch.manual_seed(0)
    model = bit_transformer(**{**SMALL, **options}).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "table" not in name:
                nn.init.normal_(parameter, std=0.3)
    return model.eval()


def canvas(rows: int = 3, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Every share of hidden groups, alone at their position and not."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 8, (rows, length), generator=generator)
    hide = torch.rand(rows, length, generator=generator) < torch.linspace(0.3, 1, rows)[:, None]
    return torch.where(hide, SPACE.mask_id, tokens)


@given(st.integers(1, 16), st.data())
@settings(max_examples=50, deadline=None)
def test_signs_are_the_binary_digits_with_the_highest_first(count, data):
    token = data.draw(st.integers(0, 2**count - 1))
    digits = [2 * int(digit) - 1 for digit in format(token, f"0{count}b")]
    assert signs(torch.tensor([token]), count).tolist() == [digits]


def test_the_order_of_bits_is_that_of_the_codec():
    codec = find("codecs", "bits")(bits=8, codes_per_position=2, width=8)
    assert torch.equal(codec.quantizer.inner.codebook.float(), signs(torch.arange(16), 4).float())


def test_a_position_is_its_groups_bits_and_a_hidden_group_is_zeros():
    embedding = model_of(width=48).embedding
    with torch.no_grad():
        embedding.project.weight.copy_(torch.eye(48, 6))
    embedded = embedding(torch.tensor([[[1, 6], [8, 3], [8, 8]]]))[0, :, :6]
    assert embedded.tolist() == [[-1, -1, 1, 1, 1, -1], [0, 0, 0, -1, 1, 1], [0] * 6]


def test_a_hidden_group_is_its_own_vector_where_asked():
    embedding = model_of(mask_vector=True).embedding
    vectors = embedding.hidden.weight.T
    embedded = embedding(torch.tensor([[[8, 8], [8, 3]]]))[0]
    torch.testing.assert_close(embedded[0], vectors.sum(0))
    without = embedded[1] - vectors[0]
    known = signs(torch.tensor(3), 3).double() @ embedding.project.weight[:, 3:].T
    torch.testing.assert_close(without, known)


@pytest.mark.parametrize("options", [{}, {"mask_vector": True, "classes": 3}, {"groups": 1}])
def test_table_and_embedding_free_models_agree_when_the_table_is_the_bit_matrix(options):
    read, looked_up = model_of(**options), model_of(embedding="table", **options)
    missing, unexpected = looked_up.load_state_dict(read.state_dict(), strict=False)
    assert (missing, unexpected) == (["embedding.table.weight"], [])
    tokens = canvas(length=12 * read.config.groups)
    tokens = tokens.masked_fill(tokens == 8, read.config.mask_id)
    at = tokens % 3 == 2
    assert torch.equal(read(tokens), looked_up(tokens))
    assert torch.equal(read(tokens, at=at), looked_up(tokens, at=at))
    with torch.no_grad():
        looked_up.embedding.table.weight[5].add_(1)
    tokens = torch.full_like(tokens, 5)
    assert not torch.allclose(read(tokens), looked_up(tokens), atol=1e-3)


def test_a_fresh_model_with_a_table_is_the_one_without():
    models = []
    for embedding in ("bits", "table"):
        torch.manual_seed(3)
        models.append(bit_transformer(**SMALL, embedding=embedding))
    assert torch.equal(models[0](canvas()), models[1](canvas()))


def test_the_projection_is_a_table_of_every_id_of_each_group():
    embedding = model_of().embedding
    tables = [
        signs(torch.arange(8), 3).double() @ w.T for w in embedding.project.weight.split(3, 1)
    ]
    tokens = torch.cartesian_prod(torch.arange(8), torch.arange(8))[None]
    expected = tables[0][tokens[..., 0]] + tables[1][tokens[..., 1]]
    torch.testing.assert_close(embedding(tokens), expected)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_each_group_has_a_head_of_its_own_in_canvas_order(groups):
    model = model_of(groups=groups)
    columns, width = model.config.vocab_size, 32
    tokens = torch.randint(0, columns + 1, (2, 12 * groups))
    stream = model.features(tokens)[:, ::groups, :width]
    heads = model.head.weight.view(columns, groups, width)
    expected = torch.einsum("bpd,vgd->bpgv", stream, heads).flatten(1, 2)
    torch.testing.assert_close(model(tokens), expected)


def test_a_group_attends_to_the_other_groups_of_its_position_and_of_all_others():
    model, tokens = model_of(), canvas(1)
    base = model(tokens)[0, 0]
    for position in (1, 2, LENGTH - 1):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 9
        assert not torch.allclose(model(changed)[0, 0], base, atol=1e-4)


def test_a_fresh_model_is_finite_and_tells_hidden_positions_apart():
    torch.manual_seed(0)
    model = bit_transformer(**SMALL)
    logits = model(torch.full((1, LENGTH), 8))[0]
    assert bool(logits.isfinite().all())
    assert len(torch.unique(logits, dim=0)) == LENGTH
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_the_stream_of_a_layer_is_that_of_the_tokens_position():
    model, tokens = model_of(), canvas()
    at = tokens == 8
    whole = model.features(tokens, layer=1)
    assert whole.shape == (3, LENGTH, 32)
    assert torch.equal(whole[:, ::2], whole[:, 1::2])
    torch.testing.assert_close(model.features(tokens, at=at, layer=1), whole[at])


@pytest.mark.parametrize("name", names("samplers"))
def test_every_sampler_fills_its_canvas_as_any_other(name):
    model, tokens = model_of(classes=3), canvas()
    run, label = find("samplers", name), torch.arange(3)
    with torch.no_grad():
        states = list(run(model, tokens, space=SPACE, seed=5, cond={"label": label}))
        known = tokens != SPACE.mask_id
        for state in states:
            assert torch.equal(state.tokens[known], tokens[known])
        assert bool((states[-1].tokens < 8).all())
        alone = [
            list(run(model, tokens[b : b + 1], space=SPACE, seed=torch.tensor([7]),
                     cond={"label": label[b : b + 1]}))[-1].tokens
            for b in range(3)
        ]  # fmt: skip
        together = run(
            model, tokens, space=SPACE, seed=torch.tensor([7] * 3), cond={"label": label}
        )
        assert torch.equal(torch.cat(alone), list(together)[-1].tokens)


def test_confidence_chooses_among_all_pairs_of_position_and_group():
    model, tokens = model_of(), torch.full((2, LENGTH), 8)
    with torch.no_grad():
        states = list(
            find("samplers", "confidence")(model, tokens, space=SPACE, schedule=Cosine(), steps=5)
        )
        first = states[0].revealed
        logits = model(tokens)
    # Drawn from the same logits, the revealed ones are the surest of the whole canvas.
    halves = first.view(2, -1, 2)
    assert bool((halves.any(2) & ~halves.all(2)).any())
    drawn = logits.log_softmax(2).gather(2, states[0].tokens.clamp(max=7)[..., None])[..., 0]
    torch.testing.assert_close(drawn[first], states[0].log_prob[first])
    greedy = find("samplers", "confidence")(model, tokens, space=SPACE, steps=5, temperature=0)
    with torch.no_grad():
        chosen = next(iter(greedy)).revealed
    surest = logits.log_softmax(2).max(2).values
    for row in range(2):
        top = surest[row].topk(int(chosen[row].sum())).indices
        assert set(chosen[row].nonzero()[:, 0].tolist()) == set(top.tolist())


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = bit_transformer(**SMALL)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    start = torch.randint(0, 8, (32, 1))
    tokens = (start + torch.arange(LENGTH)) % 8
    losses = []
    for step in range(30):
        loss = masked_diffusion_loss(
            model, tokens, space=SPACE, schedule=Linear(), weight="uniform", seed=step
        )
        optimiser.zero_grad()
        loss.value.backward()
        optimiser.step()
        losses.append(float(loss.nll.detach().sum() / loss.hidden.sum()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


LOAD = """
import sys
from safetensors.torch import load_file, save_file
import mdiff
tokens = load_file(sys.argv[1])["tokens"]
models = {folder: mdiff.load(folder).denoiser for folder in sys.argv[3:]}
save_file({folder: model(tokens).detach() for folder, model in models.items()}, sys.argv[2])
print(*(type(model).__name__ for model in models.values()))
"""


def test_a_saved_model_loads_by_its_directory_in_a_new_process(tmp_path):
    model, tokens = model_of(classes=2, embedding="table").float(), canvas()
    modality = find("modalities", "ids")(vocab_size=8, mask_id=8)
    mdiff.Pipeline(model, SPACE, modality, Linear(), window=LENGTH).save(tmp_path / "pipeline")
    model.save_pretrained(tmp_path / "bare")
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    folders = [str(tmp_path / "pipeline"), str(tmp_path / "bare")]
    files = [tmp_path / "tokens.safetensors", tmp_path / "logits.safetensors"]
    done = processes.python("-c", LOAD, *files, *folders, check=True)
    assert done.stdout.split() == ["BitTransformer"] * 2
    found = load_file(tmp_path / "logits.safetensors")
    for folder in folders:
        assert torch.equal(found[folder], model(tokens))


@pytest.mark.parametrize("name", ["transformer", "bit_transformer"])
def test_the_model_type_of_each_architecture_of_ours_is_the_name_of_its_file(name):
    model = find("backbones", name)(**(SMALL if name == "bit_transformer" else {}))
    assert model.model_type == f"mdiff-{name.replace('_', '-')}"


def test_the_data_alone_says_what_a_recipe_need_not():
    options = {"layout": [(3, 4, 2)], "vocab_size": 8, "mask_id": 8, "max_length": 24, "classes": 0}
    config = bit_transformer(**options, width=32, depth=1, heads=2).config
    assert (config.bits, config.groups, config.grid, config.layout) == (6, 2, [3, 4], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": None}, "grid=None"),
        ({"grid": [3]}, "two whole numbers"),
        ({"grid": [3, 0]}, "at least 1"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 4}, "bits=6: expected a multiple of groups=4"),
        ({"bits": None}, "bits=None"),
        ({"bits": 34}, "1 to 16 bits each"),
        ({"vocab_size": 11}, "vocab_size=11: the other options make it 8"),
        ({"bits": None, "vocab_size": 11}, "vocab_size=11: bits make a power of two, 8 or 16"),
        ({"mask_id": 7}, "mask_id=7: the other options make it 8"),
        ({"max_length": 12}, "max_length=12: the other options make it 24"),
        ({"layout": [(3, 4, 3)]}, "groups=2: the other options make it 3"),
        ({"layout": [(4, 4, 2)]}, "grid=.*make it .4, 4."),
        ({"layout": [(3, 4, 2)], "grid": 12}, "grid=12"),
        ({"layout": [(3, 4, 2), (1, 1, 1)]}, "one run"),
        ({"embedding": "both"}, "'bits' or 'table'"),
        ({"mask_vector": 1}, "true or false"),
        ({"tie": True}, "tie"),
        ({"causal": True}, "causal"),
        ({"heads": 3}, "divisible"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"bit": 6}, "did you mean 'bits'"),
        ({"width": 2**30, "depth": 2**20}, "needs .* GiB"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        bit_transformer(**{**SMALL, **options})


def test_a_canvas_that_cuts_a_position_in_two_is_refused():
    model, tokens = model_of(), canvas()
    with pytest.raises(ConfigError, match="23 tokens: a position holds 2"):
        model(tokens[:, 1:])
    with pytest.raises(ConfigError, match="valid cuts a position"):
        model(tokens, valid=torch.arange(LENGTH).expand(3, -1) < 7)
    with pytest.raises(ConfigError, match="documents cuts a position"):
        model(tokens, documents=(torch.arange(LENGTH).expand(3, -1) + 1) // 4)
    with pytest.raises(ConfigError, match="13 positions"):
        model(torch.full((1, 26), 8))


def test_maskbits_generator_reads_our_bits_with_each_group_turned_round():
    """Its published logits follow from our input, its projection's columns in our order.

    It reads the lowest bit of a group first, its projection's bias is the same at all positions,
    and the class stands behind them; what follows (norms after each branch) is its own.
    """
    golden = load_file(GOLDEN)
    weights = {name.removeprefix("model."): tensor for name, tensor in golden.items()}
    tokens, count = golden["tokens"], golden["tokens"].shape[1]
    model = bit_transformer(
        grid=[4, 4], bits=6, groups=2, width=32, depth=1, heads=4, classes=10, condition_width=32
    )
    with torch.no_grad():
        turned = weights["input_proj.weight"].view(32, 2, 3).flip(2).flatten(1)
        model.embedding.project.weight.copy_(turned)
        positions = weights["pos_emb"][0, :count] + weights["input_proj.bias"]
        model.position_embedding.weight.copy_(positions)
        model.label.weight.copy_(weights["class_emb.weight"])
        label = torch.where(golden["drop_label"].bool(), 10, golden["class_labels"])
        embedded = model.embedding(tokens) + model.position_embedding.weight
        last = model.label(label) + weights["pos_emb"][0, count]
        logits = maskbit_trunk(torch.cat([embedded, last[:, None]], 1), weights)[:, :count]
    torch.testing.assert_close(
        logits.unflatten(2, (2, 8)), golden["logits"], atol=1e-4, rtol=0
    )  # fmt: skip


def test_maskbits_groups_are_its_lowest_bits_first():
    golden = load_file(GOLDEN)
    whole = golden["full_tokens"]
    assert torch.equal(golden["split_tokens"], torch.stack([whole % 8, whole // 8], 2))


def maskbit_trunk(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """What MaskBit's generator makes of its input (B, L + 1, D): a BERT with four heads."""

    def linear(x, name):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    x = norm(x, "first_layer.0")
    for layer in ("transformer.layers.0", "transformer.layers.1"):
        inside = [weights[f"{layer}.0.mha.in_proj_{kind}"] for kind in ("weight", "bias")]
        qkv = F.linear(x, *inside).unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = norm(x + linear(mixed, f"{layer}.0.mha.out_proj"), f"{layer}.0.norm")
        inner = F.gelu(linear(x, f"{layer}.1.net.0"))
        x = norm(x + linear(inner, f"{layer}.1.net.2"), f"{layer}.1.norm")
    x = norm(F.gelu(linear(x, "last_layer.0")), "last_layer.2")
    return linear(x, "prediction_layer")
