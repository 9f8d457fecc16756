"""The section of a recipe that says where the work runs. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from fusegpt_ray.recipe.gpu_prices import as_meant
from fusegpt_ray.recipe.text_sections import Section, Uri

MOST = 10_000_000
_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
LabelKey = Annotated[str, StringConstraints(pattern=rf"^([a-z0-9.-]{{1,253}}/)?{_NAME}$")]
LabelValue = Annotated[str, StringConstraints(pattern=rf"^{_NAME}$")]
"""As Kubernetes and Ray have them. Ray's operators (`in(…)`, `!…`) are no values here."""


class Cluster(Section):
    """Where the work runs. Nothing here changes the result beyond floating-point reordering."""

    engine: Literal["ray", "local"] = "ray"
    """`ray`: a Ray cluster, or a local Ray if none runs. `local`: one process, neither Ray nor
    DeepSpeed imported."""
    address: Uri | None = None
    """Ray address; left out: the cluster this job runs in (RAY_ADDRESS), else a local Ray."""
    replicas: int = Field(1, ge=1, le=MOST)
    """Model replicas that score blocks and compute states in parallel."""
    gpus_per_replica: float | None = Field(None, ge=0, allow_inf_nan=False)
    """GPUs a replica and a training worker each take; left out: 1 if the cluster has GPUs, else 0.
    """
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Replicas and training workers run only on nodes of the Ray cluster that have all these
    labels, such as `ray.io/accelerator-type: H100`, which Ray gives by itself; left out: on any."""
    workers: int = Field(1, ge=1, le=MOST)
    """Data-parallel training workers; divides `fusion.batch`, and `heal.batch` if that is used."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage of the training workers."""
    micro_batch: int | None = Field(None, ge=1, le=MOST)
    """Windows that pass a worker's blocks at once: fewer take less memory; left out: its whole
    share of the loss batch. Divides that share, `fusion.batch` (or `heal.batch`) / `workers`."""
    recompute_activations: bool = False
    """Each block's activations are computed again in the backward pass: less memory, a third more
    work."""
    gpu_hour_price: float | dict[str, float] | None = None
    """What you pay for a GPU and hour, in any currency: one price, or a price for each kind of GPU,
    named as Ray names them: `{H100: 2.5, A100: 1.4}`."""
    max_hours: float | None = Field(None, gt=0, allow_inf_nan=False)
    """After so many hours of work a run stops at the next thing that it saves. Hours of all its
    sessions count; with a larger number the same command goes on. Left out: no limit."""
    max_cost: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The same, once the GPUs of a run have cost so much by `gpu_hour_price`."""
    wait_minutes: float = Field(10, ge=0, allow_inf_nan=False)
    """How long a run waits for GPUs and CPUs that the cluster lacks. An autoscaler is asked for
    them."""
    checkpoint_minutes: float = Field(5, ge=0, allow_inf_nan=False)
    """Training keeps what it has learned after the first epoch (in healing: at the first look) that
    comes so many minutes after the last training checkpoint; 0: after every one. A killed run goes
    on from there."""
    compile: Literal["auto", True, False] = "auto"
    """Whether blocks are compiled by torch: a third faster on a GPU, after some ten seconds.
    `auto`: on GPUs. Where a block cannot be compiled, it is run as it is."""
    deterministic: bool = True
    """On GPUs, use only kernels that give the same bits each time, so that a killed run ends with
    the same bytes as one that was not; `false` may be faster. CPUs always do."""
    weights: Literal["auto", "resident", "streamed"] = "auto"
    """What a replica does with the blocks' weights. `resident`: keep them on its device between
    walks and rounds. `streamed`: read them for every walk, one block ahead. `auto`: keep them if
    they take at most 40 % of the memory that is free when it starts."""
    object_store_gb: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Size of a local Ray's object store; left out: Ray's own choice, 30 % of the memory. A
    cluster's is set where it is started."""
    cache_gb: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Disk that a node may use for blocks fetched from object storage, in a folder of their
    own in `$FUSEGPT_CACHE` or the temporary folder; left out: half of what is free; 0: none."""

    @field_validator("gpu_hour_price", mode="before")
    @classmethod
    def _check_as_meant(cls, value: Any) -> Any:
        return as_meant(value)
