"""What is timed is a plan of so many networks, all of them found done; how long that takes is not tested."""

from reprolib.bench import plans


def test_plans_are_as_large_as_they_say(monkeypatch):
    sizes = []
    is_done = plans.experiments.is_done
    monkeypatch.setattr(plans.experiments, "is_done", lambda e, folder: sizes.append(e) or is_done(e, folder))
    monkeypatch.setattr(plans, "_watched_pct", lambda plan, folder: len(plan))
    planned_s, resumed_s, watched = plans.costs(200)
    assert len(sizes) == watched == 2 + 200 and min(planned_s, resumed_s) > 0
