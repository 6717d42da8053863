"""Which codec the files in a folder are of, by their settings alone."""

import re
from collections.abc import Mapping
from pathlib import Path

from mdiff.errors import CheckpointError
from mdiff.files import read_json
from mdiff.find import module_of, names

SETTINGS = "codec.json"
# What a codec of another project consists of.
PUBLISHED_CONFIG, PUBLISHED_TENSORS = "config.json", "model.safetensors"
# One that opens as a part of a model's directory alone.
IN_DIRECTORY = "vq_diffusers"
# By which the configs of codecs that nothing here opens are known: the class that is named at the
# top, and where none is the keys at any depth. TiTok's have a number of tokens instead of a grid.
CLASS_KEYS = ("_class_name", "architectures", "target", "model_class", "model_type")
CODEC_WORDS = re.compile(r"vq|vae|autoencoder|tokenizer|codec|titok|magvit", re.I)
CODEC_KEYS = {
    "codebook_embed_dim", "ddconfig", "latent_channels", "n_embed", "num_vq_embeddings",
    "quantizer_type", "vq_embed_dim", "vq_model", "z_channels",
}  # fmt: skip
ONE_DIMENSIONAL = "num_latent_tokens"
# Files, or keys, that a line names.
NAMED = 8


def published_codecs() -> dict[str, tuple[str, ...]]:
    """The codecs of other projects, and the keys that their config.json has."""
    found = {name: vars(module_of("codecs", name)).get("KEYS", ()) for name in names("codecs")}
    return {name: keys for name, keys in found.items() if keys}


def published_codec_of(described: Mapping[str, object]) -> str | None:
    """The name of the codec whose config.json this is; None where no file claims it.

    Raises CheckpointError where more than one does.
    """
    params = described.get("params")
    there = {*described, *(f"params.{key}" for key in (params if isinstance(params, dict) else {}))}
    claims = [name for name, keys in published_codecs().items() if there >= set(keys)]
    if len(claims) > 1:
        raise CheckpointError(f"config.json could be of {' or of '.join(claims)}")
    return claims[0] if claims else None


def holds_codec(folder: Path | str) -> bool:
    """Whether the folder holds a codec of ours, or one of another project that is known here."""
    if (Path(folder) / SETTINGS).exists():
        return True
    config = Path(folder) / PUBLISHED_CONFIG
    return config.is_file() and published_codec_of(read_json(config)) is not None


def unknown_codec(folder: Path | str) -> CheckpointError | None:
    """The error for the folder of a codec that does not open here; None for any other folder."""
    config = Path(folder) / PUBLISHED_CONFIG
    kind = codec_kind(read_json(config)) if config.is_file() else ""
    return no_codec(folder) if kind and not holds_codec(folder) else None


def no_codec(folder: Path | str) -> CheckpointError:
    """The error for a folder without a codec that opens: what was found in it, and what opens."""
    folder = Path(folder)
    published = published_codecs()
    own = [name for name in names("codecs") if name not in (*published, IN_DIRECTORY)]
    known = "; known: " + ", ".join([
        f"{', '.join(own)} ({SETTINGS})", *(f"{n} ({', '.join(k)})" for n, k in published.items()),
        f"{IN_DIRECTORY} (in a model's directory)",
    ])  # fmt: skip
    config = folder / PUBLISHED_CONFIG
    if config.is_file():
        described = read_json(config)
        kind = codec_kind(described)
        what = f"is of {kind}" if kind else f"has the keys {', '.join(sorted(described))[:200]}"
        return CheckpointError(f"{config}: no codec known here {what}{known}")
    try:
        found = sorted(entry.name for entry in folder.iterdir())[:NAMED]
    except OSError:
        found = []
    return CheckpointError(
        f"{folder}: there is no codec: {folder / SETTINGS} is missing; found: "
        f"{', '.join(found) or 'nothing'}{known}"
    )


def codec_kind(described: Mapping[str, object]) -> str:
    """What the config of a codec that does not open here is of; "" for that of anything else."""
    classes = [str(described[key]).strip("[']") for key in CLASS_KEYS if described.get(key)]
    named = next((name for name in classes if CODEC_WORDS.search(name)), None)
    if classes and named is None:
        return ""
    nodes, keys = [described], set[str]()
    for node in nodes:
        keys |= node.keys()
        nodes += [value for value in node.values() if isinstance(value, dict)]
    tokens = next((node[ONE_DIMENSIONAL] for node in nodes if ONE_DIMENSIONAL in node), None)
    if tokens is not None:
        return f"TiTok's one-dimensional kind ({ONE_DIMENSIONAL}={tokens!r:.20})"
    if named is not None:
        return f"the class {named[:80]}"
    shared = ", ".join(sorted(keys & CODEC_KEYS))
    return f"a kind with the keys {shared}" if shared else ""
