"""What a recipe says of texts, wherever it names one: a single text, or a mixture of several.

Of the other sections, `sections.py` tells. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.uris import refuse_secret, shown


def _without_secret(uri: str) -> str:
    refuse_secret("", uri)  # `_explain` knows the key
    return uri


Uri = Annotated[str, Field(min_length=1), AfterValidator(_without_secret)]


class Section(BaseModel):
    """One section of the recipe: immutable, every key known."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class Text(Section):
    """Where text comes from."""

    data: Uri
    """File(s) of text, JSON Lines, JSON, CSV, TSV, Parquet or Arrow: a path, glob or fsspec URI;
    or a `datasets` id such as `wikitext`."""
    config: str | None = None
    """`datasets` only: the configuration, such as `wikitext-2-raw-v1`."""
    split: str = "train"
    """`datasets` only: the split."""
    revision: str | None = None
    """`datasets` only: branch, tag or commit."""
    column: str = "text"
    """The column that holds the text, in all of these but plain text."""


class WeightedText(Text):
    """One of several texts: an element of the list that `data` may be."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the windows is this, divided by the sum of all weights."""

    @model_validator(mode="before")
    @classmethod
    def _check_has_keys(cls, value: Any) -> Any:
        if isinstance(value, str):
            fix = "give each text of the list as {data: …, weight: …}"
            raise UserError("", shown(value), "a text of a list has keys of its own", fix)
        return value


_ONE, _SEVERAL = TypeAdapter[str](Uri), TypeAdapter(tuple[WeightedText, ...])


class Texts(Text):
    """Where text comes from: one text, or a mixture of several."""

    data: Uri | tuple[WeightedText, ...]  # type: ignore[assignment]
    """One text, as elsewhere; or a list of several, each with the keys of a text and a `weight`."""

    @field_validator("data", mode="before")
    @classmethod
    def _check_as_meant(cls, value: Any) -> Any:
        """Validates the branch of the union that was meant: pydantic would complain of both."""
        if isinstance(value, Mapping):
            fix = "begin it with a dash, as an element of a list of texts"
            raise UserError("", shown(value), "neither a text's URI nor a list of texts", fix)
        if value is None and cls.model_fields["data"].default is None:
            return None
        if not isinstance(value, list | tuple):
            return _ONE.validate_python(value)
        if not value:
            raise UserError("", value, "an empty list of texts", "list at least one text")
        parts = _SEVERAL.validate_python(value)
        texts = [part.model_dump(exclude={"weight"}) for part in parts]
        for number, text in enumerate(texts):
            if (first := texts.index(text)) < number:
                problem = f"texts {first} and {number} of the list (from 0) are the same"
                raise UserError("", text["data"], problem, "list it once, with the sum of weights")
        return parts

    @field_validator("config", "split", "revision", "column")
    @classmethod
    def _check_alone(cls, value: Any, info: ValidationInfo) -> Any:
        """Of a list, each text has keys of its own. What says no more than the default is taken:
        it stands in every recipe that was written as JSON."""
        name = str(info.field_name)
        data = info.data.get("data", "")
        own = value != cls.model_fields[name].default
        if own and data is None:
            raise UserError("", value, "stands beside no data", "give data, or leave it out")
        if own and isinstance(data, tuple):
            fix = f"write {name} into those elements of the list that need it"
            raise UserError("", value, "stands beside a list of texts, each with its own keys", fix)
        return value

    @property
    def parts(self) -> tuple[WeightedText, ...]:
        """The texts of the mixture; a single text is one of weight 1."""
        if isinstance(self.data, tuple):
            return self.data
        return (WeightedText(**{key: getattr(self, key) for key in Text.model_fields}),)
