"""Published pickles (.pth, .ckpt) into safetensors: the only module that opens a pickle.

torch's restricted reader makes tensors and plain containers and nothing else; what a training
run kept beside its weights is read as an inert object, or the file is refused. Nothing in the
file is called.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mdiff.errors import CheckpointError, ConfigError, nearest
from mdiff.files import (
    CONFIG,
    MANIFEST,
    PICKLE_STARTS,
    PICKLE_SUFFIXES,
    WEIGHTS,
    parse_yaml,
    read_json,
    read_model_files,
    read_tensors,
    staged,
)
from mdiff.modalities.image import (
    codec_kind,
    holds_codec,
    load_codec,
    no_codec,
    published_codec_of,
    published_codecs,
)
from mdiff.pipeline.loading import CODEC_FOLDER
from mdiff.pipeline.published import built, family_of, load_published, published_backbones

FLAG = "--from-pickle"
# Where training runs keep a state dict, the first that is there.
NESTS = ("state_dict", "model_state_dict", "model")
EMA, SHADOW = "ema", "shadow_params"
# Prefixes of every name by wrappers, and of what belongs to a training's loss.
WRAPPERS, LOSSES = ("module.", "_orig_mod."), ("loss.",)
# Names of a run's settings: read as inert objects, as no weight depends on them.
INERT = (
    "_codecs.encode", "argparse.Namespace", "builtins.dict", "builtins.int", "builtins.list",
    "builtins.str", "collections.defaultdict", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray.scalar", "numpy.dtype", "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata", "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode", "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "typing.Any",
)  # fmt: skip
CONFIG_NAMES = ("config.json", "config.yaml", "model.yaml")
# How deep in a YAML file the node of a model is, such as model.vq_model.
NODE_DEPTH = 3


class Inert:
    """Stands for an object of a run's settings; it takes any arguments and keeps none."""

    def __init__(self, *_: object, **__: object) -> None:
        """Nothing is kept, nor of what a pickle sets afterwards."""

    __setstate__ = __setitem__ = __init__


@dataclass(frozen=True)
class Converted:
    """What was written: the family and the tensors' names; `dropped` was left out of the file."""

    family: str
    tensors: list[str]
    dropped: list[str] = field(default_factory=list)


def convert(
    source: Path, out: Path, *, from_pickle: bool = False, family: str | None = None,
    config: Path | None = None, ema: bool = False, codec: Path | None = None,
) -> Converted:  # fmt: skip
    """Write the model in `source` as config.json and model.safetensors in the new folder `out`.

    `from_pickle` allows a pickle to be opened. `family` is the name of the backbone or codec
    where the config does not decide it. `config` is a JSON or YAML file, by default one beside
    the source. `ema` takes the averaged weights. `codec` is a codec's folder, copied beside a
    generator. Every tensor is accounted for before `out` appears. Raises CheckpointError for
    files that cannot be read or do not fit, ConfigError for invalid options.
    """
    if family is not None and family not in (known := families()):
        raise ConfigError(f"--family {family!r}; {nearest(family, known)}")
    if not source.is_file():
        raise CheckpointError(f"{source} is no file: expected the weights to convert")
    if out.exists():
        raise CheckpointError(f"{out} exists already: name a new folder")
    if codec is not None and not holds_codec(codec):
        raise CheckpointError(f"--codec: expected the folder of a codec: {no_codec(codec)}")
    name, described = _described(source, config, family)
    content = _content(source, from_pickle=from_pickle)
    module = built(name, described) if name in published_backbones() else None
    names = None if module is None else {each for each, _ in module.named_parameters()}
    tensors, dropped = weights_in(content, ema=ema, names=names)
    with staged(out) as folder:
        (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        save_file(_apart(tensors), folder / WEIGHTS[0], metadata={"format": "pt"})
        _check(name, folder, source)
        if codec is not None:
            shutil.copytree(codec, folder / CODEC_FOLDER, ignore=shutil.ignore_patterns(MANIFEST))
            load_codec(folder / CODEC_FOLDER)
    return Converted(name, sorted(tensors), dropped)


def families() -> list[str]:
    """The backbones and codecs of other projects."""
    return sorted([*published_backbones(), *published_codecs()])


def read_pickle(path: Path) -> object:
    """The content of a pickle, by torch's restricted reader; CheckpointError where that refuses."""
    inert = torch.serialization.safe_globals([(Inert, name) for name in INERT])
    try:
        with warnings.catch_warnings(), inert:
            # It warns of pickles newer than its own, and reads or refuses them all the same.
            warnings.simplefilter("ignore")
            content: object = torch.load(path, map_location="cpu", weights_only=True)
            return content
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        needs = f" ({named[1][:80]})" if named else ""
        raise CheckpointError(
            f"{path} needs more than weights{needs}: it is not opened, as that could run code"
        ) from None
    except Exception as error:
        # A damaged file may raise anything.
        raise CheckpointError(
            f"{path} cannot be read as weights: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:120]}"
        ) from None


def weights_in(
    content: object, *, ema: bool = False, names: set[str] | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint under their plain names, and what was left out.

    A state dict is at the top or under one of `NESTS`; `ema` takes the averages: a state
    dict of their own, or a list in the order of the parameters, which `names` tells from
    buffers. Raises CheckpointError where there is none.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"the file holds a {type(content).__name__}: expected a state dict")
    nest = next((name for name in NESTS if isinstance(content.get(name), Mapping)), None)
    state = content if nest is None else content[nest]
    dropped = [] if nest is None else [f"{key}" for key in content if key != nest]
    found = _plain(state, dropped)
    if ema:
        averages = content.get(EMA)
        if not isinstance(averages, Mapping):
            raise CheckpointError(f"--ema: the file has no averages under {EMA!r}")
        dropped = [key for key in dropped if key != EMA] + [nest or "the weights of the last step"]
        if isinstance(averages.get(SHADOW), list):
            found = found | _shadow(averages[SHADOW], found, names)
        else:
            found = _plain(averages, dropped)
    if not found:
        raise CheckpointError(
            f"the file holds no tensors; its keys: {', '.join(map(str, content))}"
        )
    return found, dropped


def _plain(state: Mapping[object, object], dropped: list[str]) -> dict[str, Tensor]:
    """The tensors of a state dict without wrappers' prefixes; `dropped` gets the other keys."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        name = str(key)
        while name.startswith(WRAPPERS):
            name = name.removeprefix(next(w for w in WRAPPERS if name.startswith(w)))
        name = name.replace("._orig_mod.", ".")
        if not isinstance(value, Tensor) or name.startswith(LOSSES):
            dropped.append(str(key))
        elif name in found:
            raise CheckpointError(f"{name!r} is there twice, under different prefixes")
        else:
            found[name] = value
    return found


def _shadow(
    averages: Sequence[object], found: Mapping[str, Tensor], names: set[str] | None
) -> dict[str, Tensor]:
    """A list of averages by the names of the parameters, in their order."""
    own = [name for name in found if names is None or name in names]
    pairs = zip(own, averages)
    fitting = {n: x for n, x in pairs if isinstance(x, Tensor) and x.shape == found[n].shape}
    if not len(fitting) == len(own) == len(averages):
        raise CheckpointError(
            f"--ema: {len(averages)} averages do not fit the {len(own)} parameters in order"
        )
    return fitting


def _content(source: Path, *, from_pickle: bool) -> object:
    """The content of a safetensors file, or of a pickle where that is allowed."""
    with source.open("rb") as file:
        start = file.read(4)
    if source.suffix not in PICKLE_SUFFIXES and not start.startswith(PICKLE_STARTS):
        return read_tensors(source)
    if not from_pickle:
        raise CheckpointError(
            f"{source} is a pickle, which can run code: {FLAG} reads the weights of one that you "
            "trust, with torch's restricted reader"
        )
    return read_pickle(source)


def _described(
    source: Path, config: Path | None, family: str | None
) -> tuple[str, dict[str, object]]:
    """The family and its config: the one node of the config file that a family claims."""
    beside = [source.with_suffix(suffix) for suffix in (".json", ".yaml", ".yml")]
    beside += [source.parent / name for name in CONFIG_NAMES]
    path = config or next((path for path in beside if path.is_file()), None)
    if path is None:
        raise ConfigError(f"{source}: no config beside it: give --config FILE")
    is_yaml = path.suffix in (".yaml", ".yml")
    found: object = parse_yaml(path.read_bytes(), origin=str(path)) if is_yaml else read_json(path)
    named = [(family_of(node) or published_codec_of(node), node) for node in _nodes(found)]
    claims = [(name, node) for name, node in named if name is not None]
    if family is not None:
        claims = [(name, node) for name, node in claims if name == family]
        claim = published_backbones().get(family)
        if not claims and claim is not None and claim.architectures and isinstance(found, dict):
            return family, found | {"architectures": [claim.architectures[0]]}
    if len(claims) != 1:
        kind = codec_kind(found) if isinstance(found, dict) else ""
        what = " or ".join(name for name, _ in claims) or kind or "no known family"
        raise CheckpointError(f"{path} is of {what}: give --family, one of {', '.join(families())}")
    return claims[0]


def _nodes(found: object, depth: int = NODE_DEPTH) -> Iterator[dict[str, object]]:
    """The mappings of a config, outer ones first."""
    if isinstance(found, dict) and depth:
        yield found
        for value in found.values():
            yield from _nodes(value, depth - 1)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, which the format does not have."""
    written: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = (tensor.clone() if address in written else tensor).contiguous()
        written.add(address)
    return found


def _check(family: str, folder: Path, source: Path) -> None:
    """Load what was written; CheckpointError, naming the source, where a tensor does not fit."""
    try:
        if family in published_backbones():
            load_published(read_model_files(folder), family)
        else:
            load_codec(folder)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(folder), str(source))) from None
