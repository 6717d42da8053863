"""generation_config.json: what a model's own files say of how it generates."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from mdiff.files.config_fields import MOST_IDS

GENERATION_CONFIG = "generation_config.json"
# Options that say how many positions a call reveals.
PACE = {"steps", "counts", "per_call", "threshold", "sweeps", "nats", "nats_per_call"}
Count = Annotated[int, Field(ge=1, le=MOST_IDS)]
Id = Annotated[int, Field(ge=0)]


class GenerationConfig(BaseModel):
    """The entries of generation_config.json that are read here; None where it states none.

    Other entries are of other libraries. `block_length` is also read as block_size.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, frozen=True, populate_by_name=True
    )
    eos_token_id: Id | list[Id] | None = Field(default=None, description="an id or a list of ids")
    max_new_tokens: Count | None = None
    max_length: Count | None = None
    block_length: Count | None = Field(
        default=None, validation_alias=AliasChoices("block_length", "block_size")
    )
    steps: Count | None = None
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_IDS)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        stated = self.eos_token_id
        return () if stated is None else (stated,) if isinstance(stated, int) else tuple(stated)

    def beside(self, given: Mapping[str, object]) -> dict[str, float]:
        """The options of sampling that it states, but for those that a call has `given`.

        The filters of the draw go with its temperature, and the steps with no other number of
        reveals a call.
        """
        stated: dict[str, float | None] = {"block_length": self.block_length}
        if not PACE & set(given):
            stated["steps"] = self.steps
        if self.do_sample is False or self.temperature == 0:
            stated["temperature"] = 0.0
        elif "temperature" not in given:
            # A top_k of 0 and a top_p of 0 or 1 leave nothing out.
            top_p = None if self.top_p == 1 else self.top_p
            stated |= {"temperature": self.temperature, "top_k": self.top_k or None}
            stated["top_p"] = top_p or None
        return {k: v for k, v in stated.items() if v is not None and k not in given}
