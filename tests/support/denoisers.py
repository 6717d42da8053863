"""One small pipeline for each kind of denoiser, and the calls that can be made of all of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from folders import GOLDEN
from masked_lms import MASK, VOCABULARY, tiny

import mdiff
from mdiff import Pipeline, TokenSpace
from mdiff.backbones.bit_transformer import bit_transformer
from mdiff.backbones.masked_lm import masked_lm
from mdiff.backbones.transformer import transformer
from mdiff.files import read_model_files
from mdiff.modalities.ids import ids
from mdiff.pipeline.published import load_published


@dataclass(frozen=True)
class Kind:
    """A pipeline, a prompt, items to score, and the options of its generations."""

    pipeline: Pipeline
    prompt: object = ""
    items: object = "3 5 1"
    options: dict[str, object] = field(default_factory=dict)


def of_ids(denoiser, *, columns, window):
    """A pipeline of plain ids, whose mask is the id after the last."""
    medium = ids(vocab_size=columns, mask_id=columns)
    return Pipeline(denoiser.eval(), TokenSpace(columns, mask_id=columns), medium, window=window)


def spread(module):
    """The module with weights large enough to tell tokens apart."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def plain():
    made = spread(transformer(vocab_size=30, width=32, depth=2, heads=2))
    return Kind(of_ids(made, columns=30, window=16), "3 5", options={"length": 5})


def timed():
    made = spread(transformer(vocab_size=30, width=32, depth=2, heads=2, uses_time=True))
    return Kind(of_ids(made, columns=30, window=16), "3 5", options={"length": 5})


def bits():
    made = spread(bit_transformer(layout=[[2, 3, 2]], vocab_size=4, width=32, depth=2, heads=2))
    return Kind(of_ids(made, columns=4, window=12), "3 1", "3 1 2 0 1 2 3 0 1 2 3 0")


def guided():
    kind = plain()
    options = {"length": 5, "guidance_scale": 1.5, "guidance_schedule": "linear"}
    return Kind(kind.pipeline, kind.prompt, options=options)


def negative():
    kind = plain()
    options = {"length": 5, "guidance_scale": 2.0, "negative_prompt": "7 1 2"}
    return Kind(kind.pipeline, kind.prompt, options=options)


def of_transformers(kind):
    model = masked_lm(tiny(kind), mask_id=MASK)
    medium = ids(vocab_size=VOCABULARY, mask_id=MASK)
    made = Pipeline(model, TokenSpace(VOCABULARY, mask_id=MASK), medium, window=20)
    return Kind(made, "7 9", ["7 9 11 8 30", "12 8"], {"length": 5})


def published(name, **options):
    loaded = mdiff.load(GOLDEN / name, device="cpu", **options)
    whole = "maskbit" in name or "halton" in name
    length = {"sampler": "confidence", "steps": 2} if whole else {"length": 4}
    items = " ".join(["3"] * loaded.window) if whole else "1 2 3"
    return Kind(loaded, "", items, length)


def gidd():
    """Its logits alone: its noise also writes tokens, so that loading it to generate is refused."""
    made = load_published(read_model_files(GOLDEN / "gidd"), "gidd").eval()
    medium = ids(vocab_size=made.vocab_size, mask_id=made.mask_id)
    pipeline = Pipeline(made, TokenSpace(made.vocab_size, mask_id=made.mask_id), medium, window=8)
    return Kind(pipeline, "", "1 2 3", {"length": 4})


def pictures():
    loaded = mdiff.load("builtin:fashion", device="cpu")
    return Kind(
        loaded, {"label": "sneaker"}, [], {"sampler": "halton", "steps": 2, "guidance_scale": 2.0}
    )


def amused():
    loaded = mdiff.load(GOLDEN / "amused", device="cpu")
    return Kind(loaded, "a red cat", [], {"steps": 2, "guidance_scale": 2.0})


KINDS = {
    "transformer": plain, "with the time": timed, "bit_transformer": bits, "guided": guided,
    "negative prompt": negative,
    **{f"masked lm {k}": functools.partial(of_transformers, k) for k in ("bert", "convbert")},
    **{
        name: functools.partial(published, name)
        for name in (
            "llada", "dream", "mdlm", "bd3lm", "smdm", "halton_transformer",
            "maskbit_lfqbert",
        )
    },
    "llada_moe": functools.partial(published, "llada_moe", mask_id=63),
    "llada2_moe": functools.partial(published, "llada2_moe", mask_id=63),
    "gidd": gidd, "pictures": pictures, "amused": amused,
}  # fmt: skip


@functools.cache
def kind_of(name):
    """The kind of that name, made once."""
    return KINDS[name]()


def calls(kind, seed):
    """What each public call of a kind gives, by the call's name."""
    pipeline, options = kind.pipeline, {**kind.options, "seed": seed}

    def generated():
        return [(s.tokens, s.log_prob, s.calls) for s in pipeline.generate(kind.prompt, **options)]

    def streamed():
        return [s.tokens.tolist() for s in pipeline.stream(kind.prompt, **options)]

    def scored():
        return pipeline.score(kind.items, draws=2, seed=seed).nats.tolist() if kind.items else None

    def shown():
        try:
            return pipeline.features(kind.items).tolist() if kind.items else None
        except mdiff.ConfigError as error:
            return str(error)

    return {"generate": generated, "stream": streamed, "score": scored, "features": shown}
