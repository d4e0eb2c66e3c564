"""Costs are medians over rounds, and ratios those of one round."""

from __future__ import annotations

import pytest

from lit_personalize.report import costs


def test_ratios_are_of_the_same_round() -> None:
    """A slow minute strikes all methods of a round."""
    def measured(*seconds: float) -> list[dict[str, object]]:
        return [{"trained parameters": 7, "seconds": [s, s, 9 * s], "peak bytes": int(100 * s), "file bytes": 5}
                for s in seconds]  # fmt: skip

    found = costs.summary({"first": measured(1.0, 4.0, 1.0), "second": measured(2.0, 8.0, 2.0)}, 30)
    assert found["rounds"] == 3 and found["steps"] == 30 and found["circumstances"]["cores"] >= 1
    first, second = found["methods"]["first"], found["methods"]["second"]
    assert (first["speed ratio"], second["speed ratio"]) == (1.0, 0.5)
    assert (first["steps per second"], second["steps per second"]) == (1.0, 0.5), "a long step is no median"
    assert (second["peak bytes"], second["trained parameters"]) == (800, 7)


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        costs.main(["--steps", str(costs.WARM)])
    assert f"more than the {costs.WARM} that are not timed" in capsys.readouterr().err
