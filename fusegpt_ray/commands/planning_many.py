"""What `validate` and `plan` tell of a family or a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusegpt_ray.commands.options import silent
from fusegpt_ray.errors import UserError

if TYPE_CHECKING:
    from fusegpt_ray.comparison.cells import Comparison
    from fusegpt_ray.family.members import Members
    from fusegpt_ray.scheduling.mistakes import Mistakes
    from fusegpt_ray.terminal.display import Display
    from fusegpt_ray.terminal.table import Table


def asked_by(data: Mapping[str, Any]) -> str:
    """ "family" or "compare", if a recipe asks for many runs; else nothing."""
    from fusegpt_ray.run.outputs import COMPARISONS, FAMILIES

    return next((name for name in (FAMILIES, COMPARISONS) if name in data), "")


def _read(data: Mapping[str, Any], found: Mistakes) -> Members | Comparison | None:
    from fusegpt_ray.comparison.cells import Comparison
    from fusegpt_ray.family.members import SECTION, Members

    kind: type[Members] | type[Comparison] = Members if SECTION in data else Comparison
    return kind.read(data, found)


def mistakes(data: Mapping[str, Any], display: Display) -> tuple[list[UserError], list[str]]:
    """Those of all runs: of keys and values first; and what was not looked up."""
    from fusegpt_ray.scheduling.mistakes import Mistakes

    found = Mistakes(stops=False)
    asked = _read(data, found)
    if found.told or asked is None:
        return found.told, []
    from fusegpt_ray.scheduling.planned import all_mistakes  # torch

    return all_mistakes(asked.runs, display)


def planned(
    data: Mapping[str, Any], gpu: str | None, gpus: int | None, probe: bool
) -> dict[str, Any]:
    """See `forecast`; with "kind" and "name"."""
    from fusegpt_ray.scheduling.mistakes import Mistakes

    asked = _read(data, Mistakes())
    assert asked is not None, "the first mistake ends it"
    from fusegpt_ray.family.members import Members
    from fusegpt_ray.planning.outlook import Device  # torch
    from fusegpt_ray.scheduling import forecast
    from fusegpt_ray.scheduling.planned import planned as plan_of

    quota, priorities = None, dict[str, int]()
    if isinstance(asked, Members):
        quota, priorities = asked.gpus, {one.name: one.priority for one in asked.members}
    show = silent()
    runs = [
        forecast.PlannedRun(
            run.recipe.output.name, plan_of(run, show, looks=True), priorities.get(run.model, 0)
        )
        for run in asked.runs
    ]
    device = Device.named(gpu) if gpu else Device.here()
    count = gpus or (forecast.gpus_needed(runs, device) if device.kind == "cuda" else 1)
    on = forecast.Premises(device, count, asked.at_once, quota)
    about = {"kind": asked_by(data), "name": asked.name}
    if probe:
        from fusegpt_ray.planning.probe import probe as measure

        return {**about, **forecast.forecast(runs, on, measure)}
    return {**about, **forecast.forecast(runs, on)}


def show(result: dict[str, Any]) -> None:
    """For a person."""
    from rich.console import Console

    from fusegpt_ray.terminal.display import byte_count, flop_count

    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False)

    device, rows = result["device"], result["runs"]
    where = device if device.endswith("CPU") else f"{result['gpus']} × {device}"
    say(f"{result['kind']} {result['name']}: {len(rows)} runs on {where}")
    console.print(_table(result))
    for part in result["shared"]:
        others = len(part["runs"]) - 1
        say(f"once for {others + 1} runs: {part['what']} ({flop_count(part['flops'])})")
    say(f"at most {flop_count(result['flops'])}, {byte_count(result['published_bytes'])} published")
    for line in (*_times(result), *uncounted(rows), *_unpriced(rows), *_mistakes(result)):
        say(line)


def _table(result: dict[str, Any]) -> Table:
    from rich.text import Text

    from fusegpt_ray.terminal.display import duration, flop_count
    from fusegpt_ray.terminal.table import Table

    timed, gpus = result["seconds"] is not None, not result["device"].endswith("CPU")
    more = ["begins", "ends"] * timed + ["GPUs"] * gpus + ["GPU hours"] * (gpus and timed)
    table = Table("run", "size", *(more or ["FLOP"]))
    for row in result["runs"]:
        cells = [row["run"], _become(row)]
        cells += [] if more else [flop_count(row["flops"])]
        cells += [duration(row[key]) for key in ("begins", "ends")] if timed else []
        cells += [f"{row['needs_gpus']:g}"] if gpus else []
        cells += [f"{row['gpu_hours']:,.2f}"] if gpus and timed else []
        table.add_row(*map(Text, cells))
    return table


def _become(row: Mapping[str, Any]) -> str:
    """How many blocks, or which width, the dense model has, and then those that are published."""
    targets = row["targets"]
    key, dense = "blocks", row["blocks"]
    if narrower := targets[0]["width"]:
        key, dense = "width", targets[0]["dense_width"]
    become = " ".join(str(target[key]) for target in targets)
    return f"{'width ' if narrower else ''}{dense} → {become}"


def _times(result: dict[str, Any]) -> Iterator[str]:
    from fusegpt_ray.terminal.display import duration

    if result["seconds"] is None:
        yield f"how fast {result['device']} is, is not known:"
        yield "--probe measures it, --gpu H100 tells of another"
        return
    text = f"all of it takes {duration(result['seconds'])}"
    if not result["device"].endswith("CPU"):
        text += (
            f" and {result['gpu_hours']:,.2f} GPU hours, on {result['most_gpus']:g} GPUs at most"
        )
        text += f", for {result['price']:,.2f}" if result["price"] is not None else ""
    yield text
    yield from assumed()


def uncounted(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the work of these runs lacks, and which keys would tell of it."""
    from fusegpt_ray.cost.cost import not_counted

    if texts := [*dict.fromkeys(name for row in rows for name in row["uncounted"])]:
        keys = ", ".join(f"evaluation.{name}.windows" for name in texts)
        yield f"{not_counted(texts)}, in the work or the time:"
        yield f"  it is known with {keys}"


def _unpriced(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Which runs have no price, each reason once."""
    for told in dict.fromkeys(row["unpriced"] for row in rows if row["unpriced"]):
        runs = [row["run"] for row in rows if row["unpriced"] == told]
        yield told if len(runs) == len(rows) else f"{', '.join(runs)}: {told}"


def assumed() -> Iterator[str]:
    """What is counted beside computing."""
    from fusegpt_ray.scheduling.forecast import PUBLISHED_A_SECOND, ROUND_SECONDS, START_SECONDS

    per_second = f"{PUBLISHED_A_SECOND / 1e9:g} GB published a second"
    yield f"assumed beside computing: {ROUND_SECONDS:g} s a round, {START_SECONDS:g} s for a start"
    yield f"of workers, {per_second}; reading texts and models is left out"


def _mistakes(result: dict[str, Any]) -> Iterator[str]:
    """What does not fit, and which keys help."""
    from fusegpt_ray.planning.outlook import over_budget
    from fusegpt_ray.terminal.display import byte_count

    for lack in result["lacking"]:
        yield f"{lack['run']} needs {lack['gpus']:g} GPUs, and there are {result['gpus']}:"
        yield "  lower its cluster.replicas and cluster.workers"
    for row in result["runs"]:
        for item in row["memory"]:
            if not item["fits"]:
                needs, room = byte_count(item["bytes"]), byte_count(item["room"])
                yield f"{row['run']}, {item['what']}: needs {needs} of {room}, does not fit;"
                yield f"  {item['advice']}"
        for line in over_budget(row["budget"]):
            yield f"{row['run']}: {line}"
