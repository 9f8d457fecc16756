"""Healing one model after its last round, whatever the engine: train all its blocks together, then
commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusegpt_ray.healing.sharing import Sharing
from fusegpt_ray.healing.whole_model import WholeModel
from fusegpt_ray.importance.removals import run_distances
from fusegpt_ray.model.finite import explained
from fusegpt_ray.model.stack import Stack
from fusegpt_ray.recipe.recipe import Recipe
from fusegpt_ray.run.done import Done
from fusegpt_ray.run.journal import Journal
from fusegpt_ray.run.known import Known
from fusegpt_ray.samples import Batch, fingerprint
from fusegpt_ray.store import storage
from fusegpt_ray.store.records import checksum
from fusegpt_ray.terminal.display import Display
from fusegpt_ray.text.windows import Windows
from fusegpt_ray.training.finetune import Trained, train_span
from fusegpt_ray.training.validation import lowest
from fusegpt_ray.workers.base import News, Workers


def sharing_of(
    recipe: Recipe,
    workers: Workers,
    known: Known,
    dense: Stack,
    windows: Batch,
    show: Display,
) -> Sharing:
    """How blocks form groups in healing. What is known is not measured again.

    Args:
        windows: those that score blocks.
    """
    heal = recipe.heal
    if heal is None or heal.share is None or heal.share_by == "place":
        return Sharing(heal.share if heal else None)

    def measure() -> list[float]:
        show.stage("finding which blocks can share weights")
        with explained(dense, recipe.model.source, workers.dtype):
            found: list[float] = run_distances(workers, dense, windows, settings, 1).tolist()
        return found

    settings = recipe.importance
    what = {"windows": fingerprint(windows), "shape": list(windows.shape)}
    key = {"distance": "macro influence", "tokens": settings.tokens, **what}
    return Sharing(heal.share, tuple(known.measured("changes", key, measure)))


@dataclass
class Healer:
    """Heals the models of one run."""

    recipe: Recipe
    workers: Workers
    journal: Journal
    dense: Stack
    windows: Windows
    held_out: Windows
    identity: Mapping[str, Any]
    """See `run.identity.healing_identity`."""
    show: Display
    sharing: Sharing
    """See `sharing_of`."""

    def heal(self, name: str, rounds: Sequence[Done]) -> Done:
        """The healed model after these rounds; what the journal has is not done again."""
        number = len(rounds)
        origin = checksum({"rounds": [done.to_json() for done in rounds]})
        # What is trained is another model wherever the groups could be others.
        alike = {"changes": self.sharing.changes} if self.sharing.changes else {}
        key = checksum({"after": origin, **self.identity, **alike})
        if healed := self.journal.healed(number, key, self.show.say):
            self.show.say(f"{name} is healed (found in {self.journal.folder})")
            return healed
        assert self.recipe.heal is not None
        before = self.sharing.of(rounds[-1].stack)
        try:
            with explained(self.dense, self.recipe.model.source, self.workers.dtype, trained=True):
                trained = self._train(name, number, before, key[:16])
        except Exception as error:
            error.add_note(f"stopped in healing {name}; its {number} rounds are finished")
            if isinstance(error, FloatingPointError):
                error.add_note(
                    "the same run goes on from them with other values in heal, unless one of its "
                    "models is published already"
                )
            raise
        stack = before.swap(trained.saved.blocks)
        healed = Done(self._record(trained, stack), stack, trained.saved.files)
        self.journal.commit_healed(number, key, healed)
        told = ("losses", "held_out", "states_bytes_read", "seconds")
        written = sum(file.size for file in healed.files.values())
        about = {key: healed.record[key] for key in told}
        fewer = len(self.dense) - len(stack)
        self.show.tell("healed", model=name, removed=fewer, **about, bytes_written=written)
        self.journal.pause()
        return healed

    def _train(self, name: str, number: int, stack: Stack, key: str) -> Trained:
        settings, journal = self.recipe.heal, self.journal
        assert settings is not None
        folder = journal.healed_folder(number)
        model = WholeModel(stack, self.dense, settings, self.recipe.seed, folder, journal.fence)
        task = model.task(
            self.windows.tokens_WT,
            self.held_out.tokens_WT,
            self.recipe.cluster,
            {"healing": key},
            storage.join(folder, "checkpoints"),
        )
        tokens, parts = self.windows.tokens, task.config.parts
        groups = len(self.sharing.groups(stack.kept))
        sharing = f", {groups} groups of blocks sharing weights" if groups else ""
        self.show.stage(f"healing {name} on {tokens:,} tokens{sharing}", parts)
        self.show.training(tokens // parts, model=name)

        def news(item: News) -> None:
            if isinstance(item, str):
                self.show.say(item)
            else:
                number, loss, held_out = item
                self.show.epoch(number, parts, loss, "part", held_out)

        trained = train_span(self.workers, task, news, self.journal.pause_training)
        at = lowest(trained.held_out)
        first, best = trained.held_out[0], trained.held_out[at]
        what = "loss" if settings.hidden or settings.loss == "tokens" else "KL"
        self.show.say(f"  held-out {what} {first:.4g} → {best:.4g} nats a token")
        if at < parts:
            which = f"after part {at} of {parts}" if at else "before the first step"
            fix = "a lower heal.learning_rate may do better"
            self.show.say(f"  WARNING: the best state was that {which}, which is kept; {fix}")
        share = settings.batch // self.recipe.cluster.workers
        if trained.micro_batch < (asked := self.recipe.cluster.micro_batch or share):
            fewer = f"{trained.micro_batch} of {asked}"
            self.show.say(f"  memory ran out, so fewer windows at once: {fewer} in healing")
        return trained

    def _record(self, trained: Trained, stack: Stack) -> dict[str, Any]:
        """For the manifest."""
        groups = [list(group) for group in self.sharing.groups(stack.kept)]
        return {
            **({"groups": groups} if groups else {}),
            "data": self.windows.protocol,
            "tokens": self.windows.tokens,
            "losses": trained.losses,
            "held_out": trained.held_out,
            "states_batch_size": trained.states_batch_size,
            "states_bytes_read": trained.states_bytes_read,
            "micro_batch": trained.micro_batch,
            "seconds": {
                "states": round(trained.states_seconds, 3),
                "heal": round(trained.train_seconds, 3),
            },
        }
