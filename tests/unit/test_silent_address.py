"""An address at which nothing answers as a Ray cluster does is told soon, not after minutes."""

from __future__ import annotations

import pytest

from fusegpt_ray.distributed import connection
from fusegpt_ray.distributed.connection import Connection
from fusegpt_ray.errors import UserError
from fusegpt_ray.recipe.cluster_section import Cluster


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("key", ["cluster.address", "RAY_ADDRESS"])
def test_it_is_told_soon(port: int, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.5)
    address = f"127.0.0.1:{port}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    named = {"address": address} if key == "cluster.address" else {}
    with pytest.raises(UserError) as told:
        Connection.open(Cluster(**named))
    error = told.value
    assert (error.key, error.value) == (key, address)
    assert error.problem == "no Ray cluster answers (nothing in 0.5 s)"
