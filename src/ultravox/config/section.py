"""What every block of a run configuration has in common: no unknown keys, and the types that several share."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Speed = Annotated[float, Field(ge=0.5, le=2)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]

MISFIT = "misfit"


def misfit(message: str, *keys: str) -> PydanticCustomError:
    """The error of values that are right by themselves and do not go together.

    Args:
        message: what does not fit, and what to change.
        keys: that hold these values ("optim.warmup_steps", "stages.0.name"), as seen from the section; the first is
            the likeliest to be changed.
    """
    return PydanticCustomError(MISFIT, "{message}", {"message": message, "keys": keys})


class TruthValue:
    """true or false in place of something else: it is refused, as pydantic would read `max_steps: yes` as 1."""

    def __init__(self, value: bool) -> None:
        self._value = value

    def __repr__(self) -> str:
        return str(self._value).lower()


class Section(BaseModel):
    """One block of keys: unknown keys, NaN, infinities and yes/no in place of a number are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_for_numbers(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields

        def is_wrong(key: str, value: Any) -> bool:
            return isinstance(value, bool) and key in fields and fields[key].annotation is not bool

        return {key: TruthValue(value) if is_wrong(key, value) else value for key, value in data.items()}
