"""What a run notes of its work before a round is done: the kinds of notes, and their files' names;
and what the record of a training checkpoint is called. Light: no torch.
"""

from __future__ import annotations

from typing import Literal, get_args

Note = Literal["sums", "scores", "perplexities", "samples", "search", "sharing", "plan"]
"""What is noted of a round that is under way: what its scoring has measured so far, and what it
found. Before the first round: perplexities of dense blocks, what the dense model writes after
prompts, the tournament so far, how far blocks change states, and the planned work with what else
can be told then."""
NOTES: tuple[Note, ...] = get_args(Note)
CHECKPOINT = "checkpoint.json"
"""The record of a training checkpoint, in the folder of that (see `training/checkpoints.py`)."""


def note_file(kind: Note, number: int) -> str:
    """The name of the file of a note about round `number`."""
    return f"{kind}-{number:03d}.json"
