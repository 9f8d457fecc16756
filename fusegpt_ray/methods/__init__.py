"""The methods by name: what happens to a stack once the block to remove is known."""

from fusegpt_ray.methods import fusegpt, mi, mi_ft, mi_linear
from fusegpt_ray.methods.base import Method

METHODS: dict[str, Method] = {
    method.name: method for method in (mi.METHOD, mi_linear.METHOD, mi_ft.METHOD, fusegpt.METHOD)
}
