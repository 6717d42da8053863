"""What people and other programs write, checked by pydantic; a mistake is one line in one style."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar, get_args

from pydantic import ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mdiff.errors import ConfigError, MdiffError, nearest

Settings = TypeVar("Settings")
# Known names only, and no value is coerced into another type.
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# What pydantic's types of errors expected, in the words of the other messages.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "finite_number": "a finite number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_too_short": "a text of at least {min_length} characters",
}
# What other trainers call a key, by the end of ours.
ALIASES = {
    "learning_rate": "optim.lr", "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule", "warmup": "optim.warmup_steps", "wd": "weight_decay",
    "num_warmup_steps": "optim.warmup_steps", "clip": "grad_clip", "max_grad_norm": "grad_clip",
    "gradient_clip_val": "grad_clip", "gradient_clipping": "grad_clip", "min_lr": "final_lr",
    "adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps", "max_steps": "steps",
    "num_train_steps": "steps", "iterations": "steps", "max_iters": "steps", "epochs": "steps",
    "num_train_epochs": "steps", "bs": "batch_size", "global_batch_size": "batch_size",
    "train_batch_size": "batch_size", "per_device_train_batch_size": "micro_batch",
    "micro_batch_size": "micro_batch", "gradient_accumulation_steps": "micro_batch",
    "grad_accum": "micro_batch", "save_steps": "save_every", "save_interval": "save_every",
    "save_total_limit": "keep", "logging_steps": "log.every", "log_every": "log.every",
    "log_interval": "log.every", "report_to": "trackers", "num_workers": "workers",
    "dataloader_num_workers": "workers", "ema_decay": "ema", "mixed_precision": "precision",
    "bf16": "precision", "dtype": "precision", "torch_compile": "train.compile",
    "block_size": "data.length", "max_length": "data.length", "seq_len": "data.length",
    "seq_length": "data.length", "context_length": "data.length", "path": "data.source",
    "text_column": "data.field", "hidden_size": "width",
    "d_model": "width", "n_embd": "width", "num_layers": "depth", "n_layer": "depth",
    "n_layers": "depth", "num_hidden_layers": "depth", "num_heads": "heads", "n_head": "heads",
    "n_heads": "heads", "num_attention_heads": "heads",
}  # fmt: skip
# Of a model and of a dataclass.
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
MISSING = ("missing", "missing_argument")


def parse_settings(
    kind: type[Settings], content: Mapping[str, object], *, section: str = "", origin: str = "",
    error: type[MdiffError] = ConfigError,
) -> Settings:  # fmt: skip
    """The `kind`, a model or a dataclass of pydantic, of nested plain values.

    Raises `error`: `origin`, a file, then the dotted key, which begins with `section`, and its
    value with what was expected (the description of a field that has one), or the nearest known
    key.
    """
    try:
        return kind(**{str(key): value for key, value in content.items()})
    except ValidationError as fault:
        line = _one_line(fault, kind, content, section)
        raise error(f"{origin}: {line}" if origin else line) from None


def _one_line(
    error: ValidationError, kind: type, content: Mapping[str, object], section: str
) -> str:
    """The first problem, and how many there are beside it; an unknown key is before all others."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] not in UNKNOWN)
    location = [str(part) for part in first["loc"]]
    prefix = f"{section}." if section else ""
    key = prefix + ".".join(location)
    if first["type"] in UNKNOWN:
        parent = location[:-1]
        known = [prefix + ".".join([*parent, name]) for name in _fields(_kind(kind, parent))]
        # A key that stands in the wrong section is nearest to its own name in the right one.
        everywhere = [path for path in _known(kind) if path.split(".")[-1] == location[-1]]
        return f"unknown key {key[:80]!r}; {meant(key[:80], everywhere or known, _known(kind))}"
    if first["type"] in MISSING:
        return f"{key[:80]} is missing: it must be given"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    expected, value = _expected(first), first["input"]
    field = _fields(kind).get(location[0])
    if field is not None and field.description:
        # Of a list or of several types, pydantic names one part or one type.
        key, value, more = prefix + location[0], content[location[0]], ""
        expected = field.description
    return f"{key[:200]}={value!r:.60}: expected {expected}{more}".replace("\n", " ")


def meant(key: str, known: Iterable[str], others: Iterable[str] = ()) -> str:
    """The end of an error message: the key meant by the name that other trainers use, or `nearest`.

    >>> meant("optim.learning_rate", ["optim.lr", "optim.name"])
    "did you mean 'optim.lr'?"
    """
    known = list(known)
    ours = ALIASES.get(key.rpartition(".")[2], key)
    for name in (*known, *others):
        if name.endswith(f".{ours}") or name == ours:
            return f"did you mean {name!r}?"
    return nearest(key, known)


def _expected(problem: ErrorDetails) -> str:
    known = EXPECTED.get(problem["type"])
    if known is not None:
        return known.format(**problem.get("ctx", {}))
    return problem["msg"].removeprefix("Input should be ")


def _fields(kind: object) -> Mapping[str, FieldInfo]:
    """The fields of a model or a dataclass of pydantic; {} for anything else."""
    found = vars(kind).get("__pydantic_fields__") if isinstance(kind, type) else None
    return found or {}


def _kind(kind: object, location: list[str]) -> object:
    """The type at a location, through lists, mappings and what may be null."""
    for part in location:
        known = _fields(kind)
        if part in known:
            given = (known[part].annotation, *get_args(known[part].annotation))
            kind = next((each for each in given if _fields(each)), None)
    return kind


def _known(kind: type) -> Iterator[str]:
    """The dotted keys of all sections."""
    for section in _fields(kind):
        for name in _fields(_kind(kind, [section])):
            yield f"{section}.{name}"
