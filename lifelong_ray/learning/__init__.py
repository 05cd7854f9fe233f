"""The continual-learning engine: tensors in, learners out.

Knows nothing of files, clocks, HTTP or Ray. `fit_base` makes a first `Learner`,
`fit_fast` and `fit_slow` update one, `Predictor` answers with one.
"""

from lifelong_ray.learning.analytic import AnalyticSums, projection
from lifelong_ray.learning.collective import Alone, Collective, TorchDistributed
from lifelong_ray.learning.evaluate import Evaluation, accuracy, evaluate, fit_temperature
from lifelong_ray.learning.fisher import Fisher, estimate_fisher
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.model import Classifier, build_model
from lifelong_ray.learning.paths import (
    Fit,
    FitReport,
    Labelled,
    fit_base,
    fit_fast,
    fit_full,
    fit_slow,
)
from lifelong_ray.learning.penalties import distillation_loss, ewc_penalty
from lifelong_ray.learning.predict import Answers, Predictor
from lifelong_ray.learning.replay import ReplayMemory, mix_batches
from lifelong_ray.learning.trainer import (
    EpochReport,
    ExampleTerm,
    LossTerm,
    OnEpoch,
    TrainReport,
    WeightTerm,
    train,
)

__all__ = [
    "Alone",
    "AnalyticSums",
    "Answers",
    "Classifier",
    "Collective",
    "EpochReport",
    "Evaluation",
    "ExampleTerm",
    "Fisher",
    "Fit",
    "FitReport",
    "Labelled",
    "Learner",
    "LossTerm",
    "OnEpoch",
    "Predictor",
    "ReplayMemory",
    "TorchDistributed",
    "TrainReport",
    "WeightTerm",
    "accuracy",
    "build_model",
    "distillation_loss",
    "estimate_fisher",
    "evaluate",
    "ewc_penalty",
    "fit_base",
    "fit_fast",
    "fit_full",
    "fit_slow",
    "fit_temperature",
    "mix_batches",
    "projection",
    "train",
]
