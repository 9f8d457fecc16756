"""Work in matrix products: a multiplication and an addition counted as two, as torch's
`FlopCounterMode` does.
"""

from __future__ import annotations

from fusegpt_ray.cost.matrices import attention_heads, matrices
from fusegpt_ray.model.config import read_config
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe


def block_flops(dense: Stack, length: int) -> int:
    """Of the average block, for one window of `length` tokens: its matrices (of experts those that
    a token passes), and the attention of all tokens to all.
    """
    return matrix_flops(dense, length) + attention_flops(dense, length)


def matrix_flops(dense: Stack, length: int) -> int:
    """See `block_flops`."""
    return int(2 * length * matrices(dense, dense.blocks).active_elements / len(dense))


def attention_flops(dense: Stack, length: int) -> int:
    """See `block_flops`; none where no block attends, as in state space models."""
    heads, width = attention_heads(dense)
    return 4 * heads * width * length**2


def healing_flops(recipe: Recipe, dense: Stack, kept: int, width: float = 1.0) -> int:
    """Of one window that a model of `kept` blocks is trained on, there and back, the teacher's
    logits included.

    Args:
        width: its hidden size, as a share of the dense model's.
    """
    heal, length = recipe.heal, recipe.calibration.length
    assert heal is not None
    matrix, attention = matrix_flops(dense, length) * width, attention_flops(dense, length)
    update = 0
    if heal.train == "lora":
        one = matrices(dense, dense.blocks)
        update = int(2 * heal.rank * one.active_sides / len(dense) * length)
    # Frozen matrices have no gradients of their own. (Nor does anything below the first block that
    # learns, which is not counted here.)
    learned = {"lora": 0.0, "all": 1.0, "new": 1 - len(dense) / kept}[heal.train]
    back = 3 * (attention + update) + int((2 + learned) * matrix)
    again = (matrix + attention + update) * recipe.cluster.recompute_activations
    return int(kept * (back + again) + (1 + 2 * width) * head_flops(dense, length))


def gating_flops(dense: Stack, length: int) -> int:
    """Of one window there and back through all blocks with their weights frozen, the logits
    included, but not the teacher's states.
    """
    block = 2 * matrix_flops(dense, length) + 3 * attention_flops(dense, length)
    return len(dense) * block + 3 * head_flops(dense, length)


def head_flops(dense: Stack, length: int) -> int:
    """Of the logits of one window."""
    config = read_config(dense.config).get_text_config()
    return int(2 * config.hidden_size * config.vocab_size * length)
