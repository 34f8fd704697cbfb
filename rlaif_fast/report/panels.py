"""The curves of a run: its logged metrics as panels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlaif_fast.report.figures import Curve, Panel
from rlaif_fast.report.stats import wilson_interval


class _Scalars(NamedTuple):
    """A panel of scalars that a stage logs at its steps.

    Attributes:
        title: What is shown.
        note: How to read it.
        labels: Name of each curve in the legend, by the key of its scalar.
        percent: Whether the values are shares.
        stage: "sft" or "rl".
    """

    title: str
    note: str
    labels: Mapping[str, str]
    percent: bool = False
    stage: str = "rl"


OF_LEARNING = (
    _Scalars(
        "Agreement with the oracle",
        "The policy's own order of each group against the oracle's. Tau falls, without harm, as the responses of a "
        "group become alike: few distinct pairs are left to order.",
        {"ndcg": "nDCG", "top1_agreement": "same best", "kendall_tau": "Kendall tau"},
    ),
    _Scalars(
        "Right answers sampled", "Share of the responses RL learns from.", {"accuracy": ""}, percent=True
    ),
    _Scalars(
        "Groups without signal",
        "All tied or not ranked: they teach nothing. dynamic_sampling replaces them by fresh prompts.",
        {"no_signal": ""},
        percent=True,
    ),
    _Scalars(
        "Reward model",
        "Share of the pairs of a rollout that it orders as the oracle does, before it learns from them.",
        {"reward_model/accuracy": ""},
        percent=True,
    ),
    _Scalars("Entropy", "Of the next token; zero is no exploration.", {"entropy": ""}),
    _Scalars("SFT loss", "Cross-entropy of the reference answers.", {"loss": ""}, stage="sft"),
)
OF_ORACLE = _Scalars(
    "Is the oracle being gamed?",
    "Kendall tau of its ranks with length, with those of the reference answers, and with its own when it sees "
    "no frames.",
    {"oracle/length_tau": "length", "oracle/reference_tau": "reference", "oracle/blind_tau": "blind"},
)
# This oracle is the reference and looks at no frames: both other taus are 1 by design.
OF_REFERENCE_ORACLE = _Scalars(
    "Does the oracle favour long answers?", "Kendall tau of its ranks with length.", {"oracle/length_tau": ""}
)
OF_LOSS = (
    _Scalars("RL loss", "Policy loss and its KL term.", {"loss": ""}),
    _Scalars("KL", "Distance of the policy from its start, per token.", {"kl": ""}),
)


def learning_panels(
    metrics: Sequence[Mapping[str, Any]], oracle: str = "", metric: str = "accuracy"
) -> list[Panel]:
    """The learning curves that the recorded metrics allow.

    Args:
        metrics: Lines of `metrics.jsonl`.
        oracle: The name of the run's oracle.
        metric: What the best checkpoint was chosen by: "none" keeps the last.
    """
    accuracy, wins = _validation_curve(metrics), _win_rate_curve(metrics)
    best = _best_step(accuracy if wins is None else wins, metric)
    of_validation = (
        (
            accuracy,
            "Validation accuracy",
            "Greedy answers to held-out questions as RL goes on; the band is the 95% interval, were all of "
            "them independent.",
        ),
        (
            wins,
            "Validation win rate",
            "Greedy answers to held-out questions that the oracle ranks above those where RL began; ties count half.",
        ),
    )
    panels = [
        Panel(title, note, (curve,), "RL step", points=True, percent=True, wide=True, marked_step=best)
        for curve, title, note in of_validation
        if curve is not None
    ]
    of_oracle = OF_REFERENCE_ORACLE if oracle == "reference" else OF_ORACLE
    for shown in (*OF_LEARNING, of_oracle, *OF_LOSS):
        curves = [_curve(metrics, shown.stage, key, label) for key, label in shown.labels.items()]
        found = tuple(curve for curve in curves if curve is not None)
        if found:
            xlabel = f"{shown.stage.upper()} step"
            panels.append(Panel(shown.title, shown.note, found, xlabel, percent=shown.percent))
    return panels


def _curve(metrics: Iterable[Mapping[str, Any]], stage: str, key: str, label: str) -> Curve | None:
    """A scalar over the steps of its stage, the last value logged for each; None if there are fewer than two."""
    values = {
        line["step"]: line[key] for line in metrics if line["stage"] == stage and _is_number(line.get(key))
    }
    if len(values) < 2:
        return None
    steps = sorted(values)
    return Curve(label, np.array(steps), np.array([values[step] for step in steps]))


def _best_step(curve: Curve | None, metric: str) -> int | None:
    """The step of the checkpoint that was kept; the first on a tie."""
    if curve is None:
        return None
    return int(curve.steps[-1 if metric == "none" else np.argmax(curve.values)])


def _evaluations(metrics: Iterable[Mapping[str, Any]], key: str) -> dict[int, Mapping[str, Any]]:
    """The validation results of the RL stage that have a value for `key`, by step."""
    return {
        line["step"]: line
        for line in metrics
        if (line["stage"], line.get("phase"), line.get("split")) == ("eval", "rl", "validation")
        and _is_number(line.get(key))
    }


def _win_rate_curve(metrics: Iterable[Mapping[str, Any]]) -> Curve | None:
    """Validation win rate by RL step, beginning with the start, which ties with itself; only if it is the metric."""
    found = _evaluations(metrics, "win_rate")
    if not found:
        return None
    steps = sorted(found)
    rates = [0.5, *(found[step]["win_rate"] for step in steps)]
    return Curve("", np.array([0, *steps]), np.array(rates))


def _validation_curve(metrics: Iterable[Mapping[str, Any]]) -> Curve | None:
    """Validation accuracy by RL step."""
    found = _evaluations(metrics, "accuracy")
    if len(found) < 2:
        return None
    steps = sorted(found)
    rows = [list(found[step].get("by_category", {}).values()) for step in steps]
    low = high = None
    if all(rows):
        counts = [(sum(row["correct"] for row in some), sum(row["n"] for row in some)) for some in rows]
        intervals = [wilson_interval(correct, n) for correct, n in counts]
        low = np.array([interval.low for interval in intervals])
        high = np.array([interval.high for interval in intervals])
    return Curve("", np.array(steps), np.array([found[step]["accuracy"] for step in steps]), low, high)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
