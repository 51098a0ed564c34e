"""What every block of a run configuration has in common: no unknown keys, and the types that several share."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, le=1)]
Speed = Annotated[float, Field(ge=0.5, le=2)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """One block of keys: unknown keys, NaN, infinities and yes/no in place of a number are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_for_numbers(cls, data: Any) -> Any:
        # pydantic would read `max_steps: yes` as 1
        for key, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{key} takes no true/false, got {str(value).lower()}")
        return data
