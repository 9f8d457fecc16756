"""The section `output` of a recipe: where models go, and what comes with them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, field_validator

from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.sections import one_or_many
from fusegpt_ray.recipe.specs import SAMPLE_PROMPTS
from fusegpt_ray.recipe.text_sections import Section, Uri
from fusegpt_ray.uris import refuse_ambiguous

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
IMAGES_SHOWN = 10
"""Images that a report shows at most."""


def _unambiguous(uri: str) -> str:
    refuse_ambiguous("", uri)
    return uri


Prompt = Annotated[str, Field(min_length=1, max_length=4000)]


class ImagePrompt(Section):
    """A prompt about an image."""

    image: Uri
    """The image's file, a path or an fsspec URI."""
    prompt: Prompt
    """What is asked about it."""


def _prompt_as_meant(value: Any) -> Any:
    """Validates the kind of prompt that was meant: pydantic would complain of both."""
    if isinstance(value, Mapping):
        return ImagePrompt.model_validate(value)
    return value if isinstance(value, ImagePrompt) else _PROMPT.validate_python(value)


_PROMPT = TypeAdapter[str](Prompt)
Sample = Annotated[Prompt | ImagePrompt, BeforeValidator(_prompt_as_meant)]
WritableUri = Annotated[Uri, AfterValidator(_unambiguous)]
"""A URI that is written to."""


class Output(Section):
    """Where finished models go."""

    uri: WritableUri
    """Folder or fsspec URI; models appear as `<uri>/<name>-p<percent>/`, deeper ones as
    `<name>-d<blocks>/`. A URI may not have any of `* ? [ ]` in it, nor `::` or `..`."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """First part of the published folders' names."""
    shard_gb: float = Field(5.0, gt=0, allow_inf_nan=False)
    """Largest safetensors file."""
    track: Annotated[tuple[Tracker, ...], BeforeValidator(one_or_many)] = ()
    """Where curves of the run are drawn while it works, one or a list. `tensorboard`: files in
    `<uri>/<name>.tensorboard/`. `wandb`, `mlflow`, `trackio`: by these libraries, as their own
    environment variables say. Left out: nowhere; `metrics.jsonl` is written in any case."""
    report: bool = True
    """Whether each model comes with `report.html` and pictures in its card: a few seconds, 1 MB."""
    samples: Annotated[tuple[Sample, ...], Field(max_length=100)] = SAMPLE_PROMPTS
    """Prompts that the dense and the published model continue by up to 32 tokens, to be read side
    by side in the report and the card; `[]`: none. One of at most ten may be about an image:
    `{image: …, prompt: …}`. Left out, two questions about images are asked besides, where a text
    of the run has some."""

    @field_validator("samples")
    @classmethod
    def _check_images_are_few(cls, samples: tuple[Any, ...]) -> tuple[Any, ...]:
        """The manifest holds a small copy of each."""
        about = sum(isinstance(sample, ImagePrompt) for sample in samples)
        if about > IMAGES_SHOWN:
            problem = f"more than {IMAGES_SHOWN} are about images"
            raise UserError("", about, problem, f"ask about {IMAGES_SHOWN} at most")
        return samples
