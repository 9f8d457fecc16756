"""What a recipe says of texts, wherever it names one: a single text, or a mixture of several.

Of the other sections, `sections.py` tells. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from fusegpt_ray.errors import UserError
from fusegpt_ray.uris import refuse_secret, shown


def _without_secret(uri: str) -> str:
    refuse_secret("", uri)  # `messages.py` knows the key
    return uri


Licence = Annotated[str, Field(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]+$")]
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
    image_folder: Uri | None = None
    """Where relative paths of images begin, if rows are conversations with images; left out: beside
    the file that names them."""
    licence: Licence | None = None
    """Under which licence the text stands, for the model's card; left out: what the dataset's card
    on the hub, or the README.md of a local folder, says. It shapes nothing."""

    @model_serializer(mode="wrap")
    def _as_before(self, dumped: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without keys that are left out and are newer than runs that are to keep their
        identity."""
        found: dict[str, Any] = dumped(self)
        for key in self._newer:
            if found.get(key, "") is None:
                del found[key]
        return found

    _newer: ClassVar[tuple[str, ...]] = ("licence", "image_folder")

    @property
    def label(self) -> str:
        """For people: a dataset has parts; a file is what it is."""
        return f"{self.data} ({self.config}, {self.split})" if self.config else self.data


class WeightedText(Text):
    """One of several texts: an element of the list that `data` may be."""

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its share of the windows is this, divided by the sum of all weights."""
    images: bool | None = None
    """Whether its rows are conversations with images; left out: `calibration.images`."""

    _newer: ClassVar[tuple[str, ...]] = (*Text._newer, "images")

    @model_validator(mode="before")
    @classmethod
    def _check_has_keys(cls, value: Any) -> Any:
        if isinstance(value, str):
            fix = "give each text of the list as {data: …, weight: …}"
            raise UserError("", shown(value), "a text of a list has keys of its own", fix)
        return value


class GeneratedText(Section):
    """One of several texts, which the dense model writes itself: it continues prompts by sampling,
    each to the end of a window. The prompts are no part of the text.
    """

    generate: Literal[True] | Uri
    """The prompts, each a line of plain text or a row of a table: named as `data` is. `true`: none;
    the beginning-of-sequence token is what is continued."""
    config: str | None = None
    """Of the prompts; see `Text`."""
    split: str = "train"
    """Of the prompts; see `Text`."""
    revision: str | None = None
    """Of the prompts; see `Text`."""
    column: str = "text"
    """Of the prompts; see `Text`."""
    tokens: int | None = Field(None, ge=1, le=10**10)
    """How many the model writes; left out: as many as the windows drawn from the text have, and
    those of one more."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """The logits are divided by it before a token is sampled."""
    top_p: float = Field(1.0, gt=0, le=1)
    """A token is sampled from the most probable ones that have this much probability together."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """As of any text of a list."""

    @field_validator("generate", mode="before")
    @classmethod
    def _check_as_meant(cls, value: Any) -> Any:
        """As that of `Texts`."""
        if value is False or value is None:
            fix = "name a file of prompts, or say true to have none"
            raise UserError("", value, "names no prompts", fix)
        return value if value is True else _ONE.validate_python(value)

    @property
    def prompts(self) -> Text | None:
        """Where the prompts come from, if there are any."""
        if self.generate is True:
            return None
        keys = ("config", "split", "revision", "column")
        return Text(data=self.generate, **{key: getattr(self, key) for key in keys})

    @property
    def label(self) -> str:
        """For people."""
        prompts = self.prompts
        return f"text generated {f'from {prompts.label}' if prompts else 'without prompts'}"


def _as_meant(value: Any) -> Any:
    """Validates the kind of text that was meant: pydantic would complain of both."""
    if isinstance(value, GeneratedText):
        return value
    given = value if isinstance(value, Mapping) else {}
    if "generate" in given:
        if "data" in given:
            raise UserError("", shown(value), "both data and generate", "list them as two texts")
        if "images" in given:
            problem = "text that the model writes has no images"
            raise UserError("", shown(value), problem, "leave images out")
        return GeneratedText.model_validate(value)
    own = GeneratedText.model_fields.keys() - WeightedText.model_fields.keys()
    if key := next((key for key in given if key in own), None):
        fix = f"leave {key} out, or name prompts in generate instead of a text in data"
        raise UserError("", shown(value), f"{key} is of text that the model writes", fix)
    return WeightedText.model_validate(value)


TextPart = Annotated[WeightedText | GeneratedText, BeforeValidator(_as_meant)]
_ONE, _SEVERAL = TypeAdapter[str](Uri), TypeAdapter(tuple[TextPart, ...])


class Texts(Text):
    """Where text comes from: one text, or a mixture of several."""

    data: Uri | tuple[TextPart, ...]  # type: ignore[assignment]
    """One text, as elsewhere; or a list of several, each with a `weight` and either the keys of a
    text or those of one that the dense model writes (`GeneratedText`)."""

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
        texts = [part.model_dump(exclude={"weight", "licence"}) for part in parts]
        for number, text in enumerate(texts):
            if (first := texts.index(text)) < number:
                problem = f"texts {first} and {number} of the list (from 0) are the same"
                value = text.get("data") or text["generate"]
                raise UserError("", value, problem, "list it once, with the sum of weights")
        return parts

    @field_validator("config", "split", "revision", "column", "image_folder", "licence")
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
    def parts(self) -> tuple[WeightedText | GeneratedText, ...]:
        """The texts of the mixture; a single text is one of weight 1."""
        if isinstance(self.data, tuple):
            return self.data
        return (WeightedText(**{key: getattr(self, key) for key in Text.model_fields}),)
