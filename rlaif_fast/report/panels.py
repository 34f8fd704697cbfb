"""The curves of a run: what was logged, as panels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlaif_fast.report.figures import Curve, Panel
from rlaif_fast.report.stats import wilson_interval


def learning_panels(
    metrics: Sequence[Mapping[str, Any]], oracle: str = "", metric: str = "accuracy"
) -> list[Panel]:
    """The learning curves that the recorded metrics allow.

    Args:
        metrics: Lines of `metrics.jsonl`.
        oracle: The name of the run's oracle.
        metric: What the best checkpoint was chosen by: "none" keeps the last.
    """

    def curve(stage: str, key: str, label: str = "") -> Curve | None:
        values = {
            line["step"]: line[key]
            for line in metrics
            if line["stage"] == stage and _is_number(line.get(key))
        }
        if len(values) < 2:
            return None
        steps = sorted(values)
        return Curve(label, np.array(steps), np.array([values[step] for step in steps]))

    panels = []

    def add(title: str, note: str, *curves: Curve | None, **options: Any) -> None:
        found = tuple(entry for entry in curves if entry is not None)
        if found:
            panels.append(Panel(title, note, found, **{"xlabel": "RL step", **options}))

    validation, wins = _validation_curve(metrics), _win_rate_curve(metrics)
    best = _best_step(validation if wins is None else wins, metric)
    add(
        "Validation accuracy",
        "Greedy answers to held-out questions as RL goes on; the band is the 95% interval.",
        validation,
        points=True,
        percent=True,
        wide=True,
        marked_step=best,
    )
    add(
        "Validation win rate",
        "Greedy answers to held-out questions that the oracle ranks above those where RL began; ties count half.",
        wins,
        points=True,
        percent=True,
        wide=True,
        marked_step=best,
    )
    add(
        "Agreement with the oracle",
        "The policy's own order of each group against the oracle's. Tau falls, without harm, as the responses of a "
        "group become alike: few distinct pairs are left to order.",
        curve("rl", "ndcg", "nDCG"),
        curve("rl", "top1_agreement", "same best"),
        curve("rl", "kendall_tau", "Kendall tau"),
    )
    add(
        "Right answers sampled",
        "Share of the responses RL learns from.",
        curve("rl", "accuracy"),
        percent=True,
    )
    add(
        "Groups without signal",
        "All tied or not ranked: they teach nothing. dynamic_sampling replaces them by fresh prompts.",
        curve("rl", "no_signal"),
        percent=True,
    )
    add(
        "Reward model",
        "Share of the pairs of a rollout that it orders as the oracle does, before it learns from them.",
        curve("rl", "reward_model/accuracy"),
        percent=True,
    )
    add("Entropy", "Of the next token; zero is no exploration.", curve("rl", "entropy"))
    add("SFT loss", "Cross-entropy of the reference answers.", curve("sft", "loss"), xlabel="SFT step")
    if oracle == "reference":  # it is the reference, and looks at no frame: both taus are 1 by design
        add(
            "Does the oracle favour long answers?",
            "Kendall tau of its ranks with length.",
            curve("rl", "oracle/length_tau"),
        )
    else:
        add(
            "Is the oracle being gamed?",
            "Kendall tau of its ranks with length, with those of the reference answers, and with its own when it sees "
            "no frames.",
            curve("rl", "oracle/length_tau", "length"),
            curve("rl", "oracle/reference_tau", "reference"),
            curve("rl", "oracle/blind_tau", "blind"),
        )
    add("RL loss", "Policy loss and its KL term.", curve("rl", "loss"))
    add("KL", "Distance of the policy from its start, per token.", curve("rl", "kl"))
    return panels


def _best_step(curve: Curve | None, metric: str) -> int | None:
    """The step of the checkpoint that was kept; of equals the first."""
    if curve is None:
        return None
    return int(curve.steps[-1 if metric == "none" else np.argmax(curve.values)])


def _evaluations(metrics: Iterable[Mapping[str, Any]], key: str) -> dict[int, Mapping[str, Any]]:
    """The evaluations on validation in the RL stage that have a figure, by step."""
    return {
        line["step"]: line
        for line in metrics
        if (line["stage"], line.get("phase"), line.get("split")) == ("eval", "rl", "validation")
        and _is_number(line.get(key))
    }


def _win_rate_curve(metrics: Iterable[Mapping[str, Any]]) -> Curve | None:
    """Validation win rate by RL step, from the start on, which ties with itself; only where it is the metric."""
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
