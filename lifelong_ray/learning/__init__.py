"""The continual-learning engine: tensors in, learners out.

Knows nothing of files, clocks, HTTP or Ray. `fit_base` makes a first `Learner`,
`fit_fast` and `fit_slow` update one, `Predictor` answers with one.
"""

from lifelong_ray.learning.allocator import keep_freed_memory
from lifelong_ray.learning.analytic import AnalyticSums
from lifelong_ray.learning.cascade import (
    Calibration,
    Cascade,
    Light,
    calibrate,
    teach_light,
    with_light,
)
from lifelong_ray.learning.collective import Alone, Collective, TorchDistributed
from lifelong_ray.learning.evaluate import (
    Evaluation,
    accuracy,
    allowed_classes,
    evaluate,
    fit_temperature,
    time_per_image,
)
from lifelong_ray.learning.fast import fit_fast
from lifelong_ray.learning.fisher import Fisher, estimate_fisher
from lifelong_ray.learning.forget import forget
from lifelong_ray.learning.from_nothing import fit_base
from lifelong_ray.learning.history import History
from lifelong_ray.learning.learner import Learner
from lifelong_ray.learning.lesson import Fit, FitReport, Labelled, Run
from lifelong_ray.learning.live import LiveHead
from lifelong_ray.learning.model import Classifier, build_model
from lifelong_ray.learning.penalties import distillation_loss, ewc_penalty
from lifelong_ray.learning.predict import Answerer, Answers, Predictor, remembered_images
from lifelong_ray.learning.replay import ReplayMemory, endless_batches, mix_batches
from lifelong_ray.learning.slow import fit_slow
from lifelong_ray.learning.trainer import (
    EpochReport,
    ExampleTerm,
    LossTerm,
    OnEpoch,
    TrainReport,
    WeightTerm,
    train,
)
from lifelong_ray.learning.update import Update, fit_update

__all__ = [
    "Alone",
    "AnalyticSums",
    "Answerer",
    "Answers",
    "Calibration",
    "Cascade",
    "Classifier",
    "Collective",
    "EpochReport",
    "Evaluation",
    "ExampleTerm",
    "Fisher",
    "Fit",
    "FitReport",
    "History",
    "Labelled",
    "Learner",
    "Light",
    "LiveHead",
    "LossTerm",
    "OnEpoch",
    "Predictor",
    "ReplayMemory",
    "Run",
    "TorchDistributed",
    "TrainReport",
    "Update",
    "WeightTerm",
    "accuracy",
    "allowed_classes",
    "build_model",
    "calibrate",
    "distillation_loss",
    "endless_batches",
    "estimate_fisher",
    "evaluate",
    "ewc_penalty",
    "fit_base",
    "fit_fast",
    "fit_slow",
    "fit_temperature",
    "fit_update",
    "forget",
    "keep_freed_memory",
    "mix_batches",
    "remembered_images",
    "teach_light",
    "time_per_image",
    "train",
    "with_light",
]
