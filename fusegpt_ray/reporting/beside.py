"""What lies beside a published model: its report, pictures for its card, and its run's events."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fusegpt_ray.errors import first_line
from fusegpt_ray.model.companions import PICTURES, REPORT
from fusegpt_ray.publishing.publish import Extra
from fusegpt_ray.store.manifest import METRICS

_WIDTH = 720
_LOOK = {"background": "white", "font": "sans-serif", "view": {"stroke": None}}
"""Of a picture, which has no page around it to take colours from."""


def beside_model(
    name: str,
    say: Callable[[str], None],
    report: bool,
    events: Callable[[], bytes],
    manifest: Mapping[str, Any],
) -> list[Extra]:
    """The events of the run that made the model `name`, and if a `report` is wanted, that and the
    pictures, as far as there is something to draw.

    A model is worth more than its pictures: if they cannot be drawn, that is said in one line, and
    there are none.

    Args:
        manifest: as in `fusegpt.json`, without its files.
    """
    told = [Extra(METRICS, events())]
    if not report:
        return told
    try:
        return [*told, *_drawn(name, json.loads(json.dumps(manifest)))]
    except Exception as error:  # whatever the charting libraries raise
        say(f"no report of {name}: it cannot be drawn here ({first_line(error)})")
        return told


def _drawn(name: str, manifest: Mapping[str, Any]) -> Iterator[Extra]:
    import altair as alt  # takes a second, and a run that draws nothing needs none of these
    import vl_convert

    from fusegpt_ray.reporting import page
    from fusegpt_ray.reporting.charts import charts
    from fusegpt_ray.reporting.facts import of_manifest

    found = of_manifest(name, manifest, manifest["publishing"]["bytes"])
    yield Extra(REPORT, page.html(found).encode(errors="replace"))
    for chart in charts(found):
        if file := PICTURES.get(chart.name):
            spec = {**chart.spec, "width": _WIDTH, "title": chart.title, "config": _LOOK}
            version = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
            image = vl_convert.vegalite_to_png(spec, vl_version=version, scale=1.5)
            yield Extra(file, image, chart.title)
