# SPDX-License-Identifier: Apache-2.0
"""Plans of a comparison: what is read, what is refused, how rows are named."""

from __future__ import annotations

import json

import pytest

from disca.compare.plan import RowPlan, load_plan, plan_names, row_plan
from disca.errors import UserError


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seeds": []}, "seeds must be different"),
        ({"seeds": [1, 1]}, "seeds must be different"),
        ({"seeds": [-1]}, "from 0 up"),
        ({"clips": 1}, "clips: .*greater than or equal to 2"),
        ({"repeats": 0}, "repeats"),
        ({"rows": []}, "rows"),
        ({"rows": [{"model": "cfg"}]}, "rows.0.steps"),
        ({"rows": [{"model": "cfg", "steps": 2}] * 2}, "two rows of the group"),
        ({"surprise": 1}, "surprise"),
        ({"groups": [{"rows": []}]}, "needs 'group'"),
        ({"groups": None}, "'groups' must be a list, got None"),
        ({"rows": 5}, "'rows' must be a list, got 5"),
        ({"groups": [{"group": "g", "rows": None}]}, "'rows' must be a list"),
        ({"groups": [{"group": "g", "rows": [5]}]}, "a row is a policy or a mapping"),
        ({"seeds": [2**40]}, "seeds must be below"),
        ({"seeds": 3}, "seeds: .*, got 3"),
    ],
)
def test_plan_rejects(tmp_path, change, match):
    path = tmp_path / "plan.yaml"
    plan = {"title": "T", "rows": [{"model": "cfg", "steps": 2}], **change}
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=match):
        load_plan(path)


def test_plan_sources(tmp_path):
    with pytest.raises(UserError, match="did you mean 'digits'"):
        load_plan("digit")
    with pytest.raises(UserError, match="no such plan"):
        load_plan(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("title: [")
    with pytest.raises(UserError, match="not valid YAML"):
        load_plan(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"title: \xff")
    with pytest.raises(UserError, match="not a text file in UTF-8"):
        load_plan(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("[1]")
    with pytest.raises(UserError, match="expected a mapping"):
        load_plan(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("title: T\nrows: [{model: cfg, steps: 2}]")
    with pytest.raises(UserError, match="no 'quick' section"):
        load_plan(tmp_path / "a.yaml", quick=True)


def test_groups_give_their_rows_what_they_leave_out(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "title: T\nclips: 9\nquick: {clips: 3, seeds: [1]}\n"
        "groups:\n- {group: g, model: cfg, steps: 9, rows: ['fora:interval=2', {steps: 4}]}\n"
    )
    plan = load_plan(path, quick=True, rows=[{"model": "x", "steps": 1}], changes={"repeats": 7})
    assert (plan.clips, plan.seeds, plan.repeats) == (3, (1,), 7)
    assert plan.rows == (
        RowPlan(group="g", model="cfg", steps=9, policy="fora:interval=2"),
        RowPlan(group="g", model="cfg", steps=4),
        RowPlan(model="x", steps=1),
    )


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", plan_names())
def test_shipped_plans_are_valid(name, quick):
    if quick and name == "demo":
        pytest.skip("the demo is quick as it is")
    assert load_plan(name, quick=quick).rows


def test_labels_and_keys():
    row = row_plan(model="cfg", steps=50, policy="taylorseer:interval=6,order=1")
    assert row.name == "taylorseer (interval 6, order 1)"
    assert row.key.startswith("cfg-50-taylorseer-interval-6-order-1-")
    assert row_plan(model="cfg", steps=50).key == "cfg-50-none"
    signs = [f"teacache:threshold=1,coefficients=[1,{value}]" for value in ("0.2", "-0.2")]
    assert len({row_plan(model="cfg", steps=50, policy=spec).key for spec in signs}) == 2
    many = ",".join(["1.0"] * 100)
    long = row_plan(model="cfg", steps=50, policy=f"magcache:threshold=1,ratios=[{many}]")
    assert len(long.key) < 100
    assert row_plan(model="cfg", steps=50).name == "cfg, 50 steps"
    with pytest.raises(UserError, match=r"steps: .* got 0"):
        row_plan(model="cfg", steps=0)
