"""A checkpoint's tensor names → the model's, by transformers' own rules: the ones that `from_pretrained` uses."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from fusegpt_ray.errors import UserError
from fusegpt_ray.model.config import KEY


def names_inside(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """By a tensor's name in the checkpoint its name in the model, if it has one there.

    Raises:
        UserError: transformers makes another tensor of it on loading.
    """
    expected = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    renamings = [item for item in conversions if not isinstance(item, WeightConverter)]
    found = {}
    for name in names:
        inside, converted = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if converted is not None:
            problem = "transformers rearranges this tensor on loading, which fusing cannot follow yet"
            fix = "use a model whose checkpoint holds its weights as the model uses them"
            raise UserError(KEY, name, problem, f"{fix} (not a mixture of experts)")
        found[name] = inside
    return found
