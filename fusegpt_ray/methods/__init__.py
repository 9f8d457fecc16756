"""The methods by name: how blocks are chosen, and what happens to the stack then."""

from fusegpt_ray.methods import (
    angular,
    dus,
    foldgpt,
    fusegpt,
    last,
    mi,
    mi_ft,
    mi_linear,
    random,
    shortgpt,
    sleb,
    slicegpt,
    streamline,
    tli,
)
from fusegpt_ray.methods.base import Method

_MODULES = (
    mi,
    mi_linear,
    mi_ft,
    fusegpt,
    streamline,
    slicegpt,
    sleb,
    shortgpt,
    angular,
    foldgpt,
    last,
    random,
    tli,
    dus,
)
METHODS: dict[str, Method] = {module.METHOD.name: module.METHOD for module in _MODULES}
