"""One update of a learner: which ways are tried, and which result is kept.

Decides by validation accuracy and says why; how each way learns is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lifelong_ray.config import LearningConfig
from lifelong_ray.learning.carry import rebuilds_sums
from lifelong_ray.learning.evaluate import clearly_better
from lifelong_ray.learning.fast import fit_fast
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Fit, Labelled, Run
from lifelong_ray.learning.slow import fit_slow
from lifelong_ray.types import LearningError


@dataclass(frozen=True)
class Update:
    """What an update gave.

    Attributes:
        fits: Every result by its name: fast, slow, expanded.
        best: The name of the best one on the validation examples; without these, the first.
        reason: Why these ways were taken.
    """

    fits: dict[str, Fit]
    best: str
    reason: str

    @property
    def chosen(self) -> Fit:
        """The best result."""
        return self.fits[self.best]


def fit_update(
    parent: Learner,
    training: Labelled,
    class_names: Sequence[str],
    config: LearningConfig,
    run: Run,
    *,
    validation: Labelled | None = None,
) -> Update:
    """Update a learner the ways that `config.update.paths` names.

    By ``default``: the fast way; the slow one where the fast one's validation accuracy falls
    short of `good_enough_accuracy` and no new class is rare; and with `expansion` ``auto`` a new
    branch where both do.
    Where the slow way was tried in vain, it sits out the next update, and after each further
    time twice as many: trying costs, and what did not pay a week ago seldom pays today.

    Arguments and errors are those of `fit_fast` and `fit_slow`.
    """
    made = _update(parent, training, class_names, config, run, validation)
    # What the paths passed on to one another is as large as the examples, and of no more use.
    return replace(made, fits={name: replace(f, entering=None) for name, f in made.fits.items()})


def _update(
    parent: Learner,
    training: Labelled,
    class_names: Sequence[str],
    config: LearningConfig,
    run: Run,
    validation: Labelled | None,
) -> Update:
    wanted = config.update.paths
    if config.update.pseudo_features and config.update.expansion != "never":
        raise LearningError(
            f"pseudo_features stand in for the features of the trunk, which a branch would need "
            f"images for; set learning.update.expansion to never, not {config.update.expansion}, "
            "or pseudo_features to 0"
        )
    fits: dict[str, Fit] = {}
    reason = f"learning.update.paths is {wanted}"
    if wanted == "default" and not parent.model.num_random_features:
        wanted, reason = "slow", "there is no analytic head for the fast way: slow alone"
    if wanted != "slow":
        fits["fast"] = fit_fast(parent, training, class_names, config, run, validation=validation)
    if wanted == "default":
        reached, enough = _reached(fits), config.update.good_enough_accuracy
        if reached is not None and reached >= enough:
            return Update(
                fits, "fast", f"frozen features suffice: fast reaches {reached:.3f} of {enough:.3f}"
            )
        reason = f"frozen features fall short: fast reaches {_shown(reached)} of {enough:.3f}"
        if validation is None and not len(parent.memory):
            return Update(fits, "fast", "no old example is left, nor any to judge by: fast alone")
        rare = _rare_class(parent, training, class_names, config.update.rare_share)
        if rare:
            return Update(fits, "fast", f"{rare}: fast alone")
        if parent.slow_rest:
            rested = _with_record(fits["fast"], parent.slow_losses, parent.slow_rest - 1)
            why = f"slow lost {parent.slow_losses} time(s) and sits out {parent.slow_rest} more"
            return Update({"fast": rested}, "fast", why)
    expansion = config.update.expansion
    if wanted != "fast" and expansion != "always":
        fits["slow"] = fit_slow(
            parent, training, class_names, config, run, validation=validation, fast=fits.get("fast")
        )
    reached = _reached(fits)
    short = reached is None or reached < config.update.good_enough_accuracy
    if wanted != "fast" and (expansion == "always" or (expansion == "auto" and short)):
        # A checkpoint is of one training: the second one starts anew after an interruption.
        again = replace(run, resume=None, on_epoch=None) if "slow" in fits else run
        fits["expanded"] = fit_slow(
            parent, training, class_names, config, again, validation=validation, expand=True
        )
        reason += f"; learning.update.expansion is {expansion}"
    best = _best(fits, keeps_all=rebuilds_sums(parent, config))
    if config.update.paths == "default" and _reached(fits) is not None:
        losses = parent.slow_losses + 1 if best == "fast" else 0
        rest = 2 ** (losses - 1) if losses else 0
        fits = {name: _with_record(fit, losses, rest) for name, fit in fits.items()}
    return Update(fits, best, reason)


def _rare_class(
    parent: Learner, training: Labelled, class_names: Sequence[str], share: float
) -> str | None:
    """Say which new class is too rare beside the known ones for gradients, if one is.

    Neither can validation examples tell, of which such a class has one or none.
    """
    counts = torch.bincount(training[1], minlength=len(class_names)).tolist()
    new = range(len(parent.class_names), len(class_names))
    rarest = min(new, key=lambda c: counts[c], default=None)
    enough = share * float(parent.sums.counts.sum()) / len(parent.class_names)
    if rarest is None or counts[rarest] >= enough:
        return None
    return (
        f"new class {class_names[rarest]} is rare: {counts[rarest]} examples, where "
        f"learning.update.rare_share of the known classes' mean is {enough:.0f}"
    )


def _with_record(fit: Fit, slow_losses: int, slow_rest: int) -> Fit:
    learner = replace(fit.learner, slow_losses=slow_losses, slow_rest=slow_rest)
    return replace(fit, learner=learner)


def _reached(fits: dict[str, Fit]) -> float | None:
    scores = [fit.report.validation_accuracy for fit in fits.values()]
    known = [score for score in scores if score is not None]
    return max(known, default=None)


def _best(fits: dict[str, Fit], *, keeps_all: bool) -> str:
    """The first result, unless a later one is better.

    It must show that it is, clearly: later updates pay for sums that are no longer those of all
    examples, and every answer for a further branch. Being better at all will do where neither is
    so, as the sums were taken anew of a memory that keeps all.
    """
    best = next(iter(fits))
    for name, fit in fits.items():
        mine, kept = fit.right, fits[best].right
        if mine is None or kept is None:
            return best  # Nothing shows that gradients did better.
        costs_nothing = keeps_all and name == "slow"
        if clearly_better(mine, kept) or (costs_nothing and int(mine.sum()) > int(kept.sum())):
            best = name
    return best


def _shown(value: float | None) -> str:
    return "no known accuracy" if value is None else f"{value:.3f}"
