"""A saved view of MLflow's charts, L0 against normalised MSE, and a link to it in each experiment's description.

So a frontier is two clicks away: the experiment, the link. MLflow keeps saved views as tags of the experiment: JSON
with a name and the compressed state of the page, in the form that its page writes (seen in version 3.17). A page that
expects another form shows its own charts instead.
"""

import base64
import json
import zlib
from typing import Any

__all__ = ["add_views", "saved_view"]

_NAME = "l0 against normalised_mse"
_VIEW = "crosshead-frontier"
_DESCRIPTION = "mlflow.note.content"
_MOMENT = 1_700_000_000_000
_CHARTS = (("l0", "normalised_mse"), ("l0", "ce_recovered"))


def saved_view() -> tuple[str, str]:
    """Key and value of the experiment tag that holds the view."""
    section = f"{_VIEW}-section"
    charts = [
        {
            "uuid": f"{_VIEW}-{x}-{y}", "type": "SCATTER", "runsCountToCompare": 100, "metricSectionId": section,
            "deleted": False, "isGenerated": False,
            "xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"},
        }
        for x, y in _CHARTS
    ]  # fmt: skip
    state = {
        "searchFilter": "", "orderByKey": "attributes.start_time", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs", "selectedColumns": [],
        "columnOrder": [], "columnWidths": {}, "runsPinned": [], "runsHidden": [], "runsVisibilityMap": {},
        "runsHiddenMode": "SHOWALL", "runsExpanded": {}, "viewMaximized": False, "runListHidden": False,
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": section, "name": "Frontiers", "display": True, "isReordered": False,
                                "deleted": False, "isGenerated": False}],
        "isAccordionReordered": False, "useGroupedValuesInCharts": True, "hideEmptyCharts": True, "groupBy": None,
        "groupsExpanded": {}, "autoRefreshEnabled": False,
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }  # fmt: skip
    compressed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    value = {"name": _NAME, "createdAt": _MOMENT, "updatedAt": _MOMENT, "state": f"deflate;{compressed}"}
    return f"mlflow.sharedViewState.{_VIEW}", json.dumps(value)


def add_views(client: Any) -> dict[str, str]:
    """Give view and link to every experiment that lacks them; a description of one's own stays.

    Returns the address of each experiment's view by the experiment's name, relative to the server.
    """
    key, value = saved_view()
    addresses = {}
    for found in client.search_experiments(order_by=["name"]):
        if found.name == "Default":
            continue
        address = f"#/experiments/{found.experiment_id}/runs?viewStateShareKey={_VIEW}&compareRunsMode=CHART"
        addresses[found.name] = address
        if key not in found.tags:
            client.set_experiment_tag(found.experiment_id, key, value)
            if not found.tags.get(_DESCRIPTION):
                client.set_experiment_tag(found.experiment_id, _DESCRIPTION, f"Frontier: [{_NAME}]({address})")
    return addresses
