"""`slicegpt`: the hidden size is made smaller, in closed form (SliceGPT, Ashkboos et al.,
arXiv 2401.15024).

RMSNorm's weights are folded into the matrices that read its output, the residual stream is rotated
to the principal axes of the calibration states, and the axes with the least variance are sliced
off: `sparsity` is the share of the hidden size that goes, as in the paper. Formulas, and where ours
differs (one rotation for all blocks, found in one walk, and the head sliced as well, so that an
ordinary checkpoint comes out): `fusion/rotation.py`. It costs one walk of the calibration windows,
and no block goes. Ours are also the rounding of the hidden size to what configurations take
(`fusion/width.py`), and that recovery (`heal`) is to the dense model's distributions; the paper's
is low-rank fine-tuning on text.
"""

from __future__ import annotations

from fusegpt_ray.fusion.narrowing import Narrowing
from fusegpt_ray.fusion.width import sliced_width
from fusegpt_ray.methods.base import Change, Method, Round


def _slice(round: Round) -> Change:
    (sparsity,) = round.recipe.sparsity
    width = sliced_width(round.dense.config, sparsity)
    round.show.stage(f"finding the principal axes of the states: {width.in_words()}")
    found = Narrowing(round.stack, width, round.folder, round.fence).on(
        round.workers, round.windows
    )
    round.show.say(f"  {found.in_words()}")
    return Change(
        found.stack,
        found.files,
        width=found.to_record(),
        states_batch_size=found.batch_size,
        states_bytes_read=found.bytes_read,
        states_seconds=found.seconds,
    )


METHOD = Method("slicegpt", None, _slice)
