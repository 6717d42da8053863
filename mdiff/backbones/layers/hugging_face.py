"""Our own models as models of transformers: for its Trainer, its Auto classes and peft.

Importing this module makes them known to `AutoConfig` and `AutoModelForMaskedLM`. Their files and
the names of their weights are those of the plain models; nothing else in mdiff needs this module.
"""

from dataclasses import asdict, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput

from mdiff.backbones.bit_transformer import BitTable, BitTransformer, BitTransformerConfig
from mdiff.backbones.layers.config import TransformerConfig
from mdiff.backbones.transformer import Transformer
from mdiff.errors import ConfigError


class PretrainedTransformerConfig(PretrainedConfig):  # type: ignore[misc]
    """`TransformerConfig` as a config of transformers; the options are its fields.

    Raises ConfigError as `TransformerConfig.of` does.
    """

    model_type = Transformer.model_type
    plain: ClassVar[type[TransformerConfig]] = TransformerConfig
    # Without this only what differs from the defaults of the day would be written down.
    has_no_defaults_at_init: ClassVar[bool] = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "max_length",
        "tie_word_embeddings": "tie",
    }
    # A field, for transformers would otherwise take it for a setting of its generation.
    max_length: int = 256

    def __init__(self, **options: object) -> None:
        named = {self.attribute_map.get(name, name): value for name, value in options.items()}
        own = {field.name for field in fields(self.plain)}
        super().__init__(**{name: value for name, value in named.items() if name not in own})
        config = self.plain.of(named)
        for name, value in asdict(config).items():
            setattr(self, name, value)

    def to_plain(self) -> TransformerConfig:
        """The config of the plain model."""
        return self.plain.of(vars(self))


class PretrainedBitTransformerConfig(PretrainedTransformerConfig):
    """`BitTransformerConfig` as a config of transformers."""

    model_type = BitTransformer.model_type
    plain = BitTransformerConfig
    # transformers gives a class without one of its own another.
    __init__ = PretrainedTransformerConfig.__init__


class TransformerForMaskedLM(Transformer, PreTrainedModel):  # type: ignore[misc]
    """`Transformer` as a model of transformers.

    Called with `tokens` it is a Denoiser; `model(input_ids=..., labels=...)` returns a
    MaskedLMOutput. The first positional argument is `tokens`, so that wrappers of `forward`
    (DistributedDataParallel, peft) are Denoisers too.
    """

    config_class = PretrainedTransformerConfig
    plain: ClassVar[type[Transformer]] = Transformer
    main_input_name = "input_ids"
    # Of its Trainer, which would give the number of items to a `forward` with **options.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"head.weight": "embedding.weight"}

    def __init__(self, config: PretrainedTransformerConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.plain.__init__(self, config.to_plain())
        self.config = config
        PreTrainedModel.post_init(self)

    def init_weights(self) -> None:
        """Only ties: the weights are initialised where the plain model is."""
        PreTrainedModel.tie_weights(self, recompute_mapping=False)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a file lacks; transformers keeps what was read from being written."""
        if isinstance(module, BitTable):
            init.copy_(module.weight, module.first_rows())
        else:
            self.initialise(module)

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings."""
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def forward(
        self, tokens: Tensor | None = None, *, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, labels: Tensor | None = None,
        return_dict: bool | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Logits of `tokens` (see the Denoiser protocol), or MaskedLMOutput of `input_ids`.

        `options` are those of a Denoiser's call. `attention_mask` (B, L) is nonzero at valid
        positions; `labels` (B, L) hold -100 where nothing is scored, and the loss is the mean
        cross-entropy of the others in nats. Raises ConfigError as `Transformer.features` does.
        """
        if tokens is not None:
            return super().forward(tokens, **options)
        if input_ids is None:
            raise ConfigError("a call without tokens: give them first, or as input_ids=")
        if attention_mask is not None:
            options["valid"] = attention_mask.bool()
        logits, loss = super().forward(input_ids, **options), None
        if labels is not None:
            at = options.get("at")
            labels = labels if at is None else labels[at]
            loss = F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())
        output = MaskedLMOutput(loss=loss, logits=logits)
        return output if return_dict is not False else output.to_tuple()

    # A class that replaces the call and not `features` beside it is one that may not be cut there.
    features = Transformer.features
    save_pretrained = PreTrainedModel.save_pretrained


class BitTransformerForMaskedLM(BitTransformer, TransformerForMaskedLM):
    """`BitTransformer` as a model of transformers; see `TransformerForMaskedLM`."""

    config_class = PretrainedBitTransformerConfig
    plain = BitTransformer
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    __init__ = TransformerForMaskedLM.__init__


def as_pretrained(model: Transformer) -> TransformerForMaskedLM:
    """A plain model as one of transformers, with the same parameters: training one trains both."""
    own = isinstance(model, BitTransformer)
    kind = BitTransformerForMaskedLM if own else TransformerForMaskedLM
    with torch.device("meta"):
        made = kind(kind.config_class(**asdict(model.config)))
    made.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return made.train(model.training)


for config, made in (
    (PretrainedTransformerConfig, TransformerForMaskedLM),
    (PretrainedBitTransformerConfig, BitTransformerForMaskedLM),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForMaskedLM.register(config, made, exist_ok=True)
