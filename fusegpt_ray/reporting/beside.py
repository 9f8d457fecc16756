"""What lies beside a published model: its report, pictures for its card, and its run's events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fusegpt_ray.errors import StorageError, first_line
from fusegpt_ray.model.companions import PICTURES, REPORT
from fusegpt_ray.publishing.publish import Extra
from fusegpt_ray.store.manifest import METRICS

if TYPE_CHECKING:
    from fusegpt_ray.reporting.charts import Chart

_WIDTH = 720
_LOOK = {"background": "white", "font": "sans-serif", "view": {"stroke": None}}
"""Of a picture, which has no page around it to take colours from."""


def beside_model(
    folder: str,
    say: Callable[[str], None],
    report: bool,
    events: Callable[[], bytes],
    manifest: Mapping[str, Any],
) -> list[Extra]:
    """The events of the run that made the model in `folder`, and if a `report` is wanted, that and
    the pictures, as far as there is something to draw.

    A model is worth more than its pictures: if they cannot be drawn, that is said in one line, and
    there are none.

    Args:
        manifest: as in `fusegpt.json`, without its files.
    """
    name = folder.rsplit("/", 1)[-1]
    told = [Extra(METRICS, events())]
    if not report:
        return told
    try:
        return [*told, *_drawn(name, folder, json.loads(json.dumps(manifest)))]
    except StorageError:
        raise
    except Exception as error:  # whatever the charting libraries raise
        say(f"no report of {name}: it cannot be drawn here ({first_line(error)})")
        return told


def _drawn(name: str, folder: str, manifest: Mapping[str, Any]) -> Iterator[Extra]:
    import altair as alt  # takes a second, and a run that draws nothing needs none of these
    import vl_convert

    from fusegpt_ray.reporting import page
    from fusegpt_ray.reporting.charts import charts
    from fusegpt_ray.reporting.facts import of_manifest, others

    size, run = manifest["publishing"]["bytes"], others(folder, manifest)
    found = of_manifest(name, manifest, size, run)
    yield Extra(REPORT, page.html(found).encode(errors="replace"))
    version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
    drawn: dict[str, list[Chart]] = {}
    for chart in charts(found):
        drawn.setdefault(chart.name, []).append(chart)
    for kind, same in drawn.items():
        if file := PICTURES.get(kind):
            specs = [{**chart.spec, "width": _WIDTH, "title": chart.title} for chart in same]
            spec = {"vconcat": specs} if len(specs) > 1 else specs[0]
            image = vl_convert.vegalite_to_png({**spec, "config": _LOOK}, version, scale=1.5)
            yield Extra(file, image, "; ".join(chart.title for chart in same))
