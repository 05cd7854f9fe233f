"""Every setting of the system, in one frozen tree.

Read from one YAML file and from ``section.key=value`` overrides; addresses and
secrets may come from the environment. Components receive their own branch only.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lifelong_ray.conditions import Condition
from lifelong_ray.types import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
PositiveSeconds = Annotated[float, Field(gt=0)]
Precision = Literal["fp32", "bf16", "int8"]


class _Branch(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StoreConfig(_Branch):
    """Where versions, log and runs live."""

    url: str = Field(
        "~/.lifelong_ray/store",
        description="A folder, or s3://bucket/prefix. LIFELONG_STORE_URL overrides it.",
    )
    endpoint_url: str = Field(
        "",
        description="S3 endpoint; empty means AWS. LIFELONG_S3_ENDPOINT_URL overrides it.",
    )


class DataConfig(_Branch):
    """The labelled images a base training starts from."""

    source: str = Field(
        "digits",
        description="digits, a torchvision data set by name (torchvision:FashionMNIST), "
        "an .npz with x_train/y_train/x_test/y_test, a folder with one folder per class, "
        "package.module:function for (train, test) PyTorch data sets of your own, or "
        "cifar100-50+50: CIFAR-100 in parts.",
    )
    folder: str = Field("data", description="Where torchvision data sets lie; never downloaded.")
    classes: tuple[str, ...] = Field((), description="Class names to use; empty means all.")
    split: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (),
        description="Numbers of classes that arrive one after the other: [50, 50] is a base of "
        "50 and one update of 50; empty means all at once.",
    )
    split_seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="Order in which the classes of `split` arrive: 0 is that of their names, "
        "1993 that of the literature.",
    )
    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of the examples to use: 0.1 is a dry run on a tenth."
    )


class ImageConfig(_Branch):
    """Limits on what a stranger may send."""

    max_bytes: int = Field(10_000_000, gt=0, description="Largest request body, bytes.")
    max_pixels: int = Field(
        16_000_000, gt=0, description="Largest width times height, read before decoding."
    )
    formats: tuple[str, ...] = Field(
        ("PNG", "JPEG", "WEBP", "BMP"), description="Pillow formats that are decoded at all."
    )


class ModelConfig(_Branch):
    """Architecture of a base training; updates inherit their parent's."""

    name: str = Field(
        "convnet",
        description="convnet, mlp, resnet20, resnet32, torchvision:NAME (any of its classifiers), "
        "or package.module:function for a backbone of your own.",
    )
    widths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (32, 64, 128),
        min_length=1,
        description="Channels per stage (convnet) or units per layer (mlp).",
    )
    norm: Literal["group", "batch", "none"] = Field(
        "group",
        description="Normalisation of convnet and resnet. batch trains fastest, and its "
        "statistics are frozen after the base training.",
    )
    pool_size: int = Field(
        2,
        gt=0,
        description="Side of the grid that the last convolution is averaged to; 1 is global "
        "average pooling, which forgets where things are.",
    )
    head: Literal["linear", "cosine"] = Field(
        "linear",
        description="Trained head. In a cosine one all classes weigh the same, so that new ones "
        "cannot shout old ones down.",
    )
    weights: str = Field(
        "",
        description="Weights to start from: empty for random ones, a .safetensors or .pth file, "
        "or for torchvision the name of a set of its hub, such as DEFAULT.",
    )
    pixels: Literal["unit", "imagenet"] = Field(
        "unit", description="unit: 0 to 1; imagenet: standardised as torchvision's weights want."
    )
    image_size: int = Field(16, gt=3, description="Model input height and width, pixels.")
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour.")


class TrainerConfig(_Branch):
    """One gradient training."""

    epochs: int = Field(30, gt=0, description="Passes over the training examples.")
    iterations: int = Field(
        0, ge=0, description="Steps in all, in place of `epochs`; 0 counts epochs."
    )
    batch_size: int = Field(64, gt=0, description="Examples per step over all workers.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd has momentum 0.9.")
    schedule: Literal["one_cycle", "constant"] = Field(
        "one_cycle", description="How the learning rate runs from first to last step."
    )
    learning_rate: float = Field(
        2e-3, ge=0, description="Peak of the schedule; 0 finds one by a range test."
    )
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled; 0 turns it off.")
    max_shift_px: int = Field(
        2, ge=0, description="Random shift of training images, pixels; 0 turns it off."
    )
    mirror: bool = Field(False, description="Mirror training images left to right at random.")
    num_shards: int = Field(
        2,
        gt=0,
        description="Logical shards of every batch. Workers share them out, so that the "
        "number of workers does not change the result.",
    )
    max_examples_at_once: int = Field(
        0,
        ge=0,
        description="Largest piece of a batch in memory; gradients are accumulated over the "
        "pieces. 0 takes a worker's part whole, and halves it when memory runs out.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Arithmetic of the forward and backward pass."
    )


class EwcConfig(_Branch):
    """Elastic weight consolidation."""

    lambda_ewc: float = Field(10.0, ge=0, le=1e30, description="Penalty weight; 0 turns EWC off.")
    group_factors: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Factors on lambda_ewc by beginning of a weight's name, the longest that "
        "fits counts: {head: 1, stages: 0.1} holds the head ten times as hard as the rest.",
    )
    estimator: Literal["exact", "sampled", "empirical"] = Field(
        "exact", description="Label of the Fisher: expectation, one draw, or the true label."
    )
    accumulation: Literal["mean", "online", "sum"] = Field(
        "mean",
        description="Fishers of several updates: mean over all examples; online: "
        "gamma * old + new, held at the newest weights; sum: every update held at its own.",
    )
    gamma: Share = Field(1.0, description="Decay of older Fishers when online.")
    num_fisher_examples: int = Field(
        500, ge=0, description="Examples of a base training that estimate importance; 0 none."
    )
    num_update_fisher_examples: int = Field(
        50, ge=0, description="New examples of an update that renew the estimate; 0 none."
    )


class DistillationConfig(_Branch):
    """Learning without forgetting: the parent's answers as soft targets."""

    weight: float = Field(0.5, ge=0, description="Loss weight; 0 turns distillation off.")
    temperature: float = Field(1.0, gt=0, description="Softening of both distributions.")
    only_where_right: bool = Field(
        True, description="Leave out examples that the parent answers wrongly, as after drift."
    )


class ReplayConfig(_Branch):
    """Remembered examples."""

    memory_per_class: int = Field(20, ge=0, description="Examples kept per class; 0 keeps none.")
    memory_share: Share = Field(
        0.0, description="Share of a class's examples kept, where that is more; 1 keeps all."
    )
    selection: Literal["class_balanced", "reservoir", "herding"] = Field(
        "class_balanced",
        description="Which are kept: a fair sample of every class, a fair sample of all that was "
        "seen, or those whose mean feature is closest to their class's.",
    )
    content: Literal["images", "features"] = Field(
        "images",
        description="features keeps no image, only what the frozen stages make of one.",
    )
    share: Annotated[float, Field(ge=0, lt=1)] | Literal["auto"] = Field(
        0.25,
        description="Least share of every update batch that comes from memory; 0 replays none; "
        "auto: the share of old examples among all that were seen, at most three quarters.",
    )
    dark_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of keeping the logits that were stored with a remembered example "
        "(DER++); 0 stores none.",
    )


class AnalyticConfig(_Branch):
    """The fast path: ridge regression on a random ReLU projection of frozen features."""

    num_features: int = Field(
        1_000, ge=0, description="Width of the random projection; 0 keeps no analytic head."
    )
    source: Literal["auto", "pixels", "features", "stages"] = Field(
        "auto",
        description="What is projected: pixels, the backbone's features, or the pooled outputs "
        "of its last two stages (convnet and resnet). auto: pixels for an mlp, else features.",
    )
    mirror: bool | Literal["auto"] = Field(
        "auto",
        description="Whether the sums are over each image and its mirror image, half each, which "
        "costs a second look at every image. auto: where the base training's validation images "
        "are clearly better explained that way; false without any.",
    )
    ridge: float = Field(
        0.0,
        ge=0,
        description="Regularisation, as a share of the mean squared feature; 0 chooses it by "
        "generalised cross-validation.",
    )
    class_balance: Share = Field(
        0.5,
        description="0 weighs every example alike, 1 lifts rare classes to the mean. Between "
        "them a class of few examples is heard without drowning out the rest.",
    )
    decay: Share = Field(
        1.0, description="What is left of older sums at every update; below 1 forgets on purpose."
    )
    max_modes: int = Field(
        4,
        gt=0,
        description="Appearances of one class that are told apart: an update that shows a known "
        "class anew opens one, the most alike are put together beyond this number.",
    )


class UpdateConfig(_Branch):
    """One incremental update: the fast path always, the slow path when it pays."""

    paths: Literal["both", "fast", "slow", "default"] = Field(
        "default",
        description="default runs fast, and slow where fast falls short of `good_enough_accuracy`.",
    )
    good_enough_accuracy: Share = Field(
        0.97, description="Validation accuracy of the fast path at which the slow one is not run."
    )
    rare_share: Share = Field(
        0.05,
        description="A new class with fewer training examples than this share of what the known "
        "ones had on average leaves a default update to the fast path.",
    )
    min_new_examples: int = Field(20, gt=0, description="Fewer new examples make no update.")
    validation_share: Share = Field(
        0.2, description="Share of the new examples that chooses between the paths."
    )
    frozen_stages: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        1,
        description="Backbone stages the slow path leaves alone; auto tries how many on the "
        "validation examples.",
    )
    labels_compete: Literal["all", "update"] = Field(
        "all",
        description="Classes that the loss of a new example compares: all, or only those of its "
        "update, as where requests say which task they belong to.",
    )
    logit_adjustment: float = Field(
        0.5,
        ge=0,
        description="How far the loss makes up for some classes being shown more often than "
        "others: the logarithm of a class's share, times this, is added to its logit while "
        "training. 0 lets frequent classes win, 1 weighs classes alike.",
    )
    weight_alignment: bool = Field(
        False, description="Scale the new rows of the head to the length of the old ones."
    )
    pseudo_features: int = Field(
        0,
        ge=0,
        description="Made-up features per old class, moved over from the nearest new class, for "
        "an update of the head without old data (FeTrIL); 0 makes none.",
    )
    expansion: Literal["never", "auto", "always"] = Field(
        "never",
        description="A new branch of the backbone beside the untouched old one; auto: where "
        "frozen features fall short of `good_enough_accuracy` and the slow path too.",
    )
    trainer: TrainerConfig = TrainerConfig(
        epochs=4, batch_size=32, learning_rate=6e-3, max_shift_px=0
    )
    ewc: EwcConfig = EwcConfig()
    distillation: DistillationConfig = DistillationConfig()
    replay: ReplayConfig = ReplayConfig()


class CascadeConfig(_Branch):
    """A light model that answers where it is sure, and leaves the rest to the version's own."""

    enabled: bool = Field(False, description="Whether one is trained at the end of a training.")
    widths: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        (8, 16), min_length=1, description="Channels per stage of the light ConvNet."
    )
    max_accuracy_loss: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.01,
        description="Accuracy that the light model's answers may cost, held with 95 % confidence. "
        "1 % needs 300 hold-out images to choose its threshold by, and as many to measure.",
    )
    min_light_share: Share = Field(
        0.3, description="Share of the answers that makes it worth asking the light model at all."
    )
    distillation_weight: float = Field(
        1.0, ge=0, description="Weight of the heavy model's answers beside the labels."
    )
    temperature: float = Field(2.0, gt=0, description="Softening of both models' answers.")
    trainer: TrainerConfig = TrainerConfig(max_shift_px=0)


class LearningConfig(_Branch):
    """How models are trained."""

    seed: int = Field(0, ge=0, description="Decides every random choice of a run.")
    base: TrainerConfig = TrainerConfig()
    analytic: AnalyticConfig = AnalyticConfig()
    update: UpdateConfig = UpdateConfig()
    cascade: CascadeConfig = CascadeConfig()


class FeedbackConfig(_Branch):
    """The log of predictions and corrections."""

    audit_share: Share = Field(
        0.05, description="Share of answers, drawn at random, for which a label is asked."
    )
    flush_interval_s: PositiveSeconds = Field(
        1.0, description="Predictions younger than this may be lost when a process is killed."
    )
    flush_rows: int = Field(2_000, gt=0, description="Rows that trigger a flush before its time.")
    group_commit_s: PositiveSeconds = Field(
        0.05, description="Feedback waits this long for company before it is made durable."
    )
    max_queue_bytes: int = Field(
        64_000_000, gt=0, description="Unflushed predictions beyond this are dropped and counted."
    )
    holdout_share: Share = Field(
        0.2, description="Share of the trusted labels, by content hash, that is never trained on."
    )
    votes_needed: int = Field(
        1, gt=0, description="Users who must agree on a label before it may be trained on."
    )
    max_votes_per_user: int = Field(
        10_000, gt=0, description="Feedback rows of one user that one update may use."
    )


class DriftConfig(_Branch):
    """When the traffic is said to have changed."""

    window_rows: int = Field(300, gt=10, description="Latest predictions that are tested.")
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.001, description="False alarm share of one test over all classes (Bonferroni)."
    )
    min_effect: Share = Field(
        0.15, description="Least Kolmogorov-Smirnov distance that counts as drift."
    )


class GateConfig(_Branch):
    """What a version must prove before it may become a candidate."""

    min_retention: Share = Field(
        0.95, description="Least share of the parent's hold-out accuracy on old classes kept."
    )
    min_retention_within_old: Share = Field(
        0.95, description="The same with only old classes competing."
    )
    min_new_accuracy: Share = Field(0.7, description="Least accuracy on the new classes.")
    min_class_accuracy: Share = Field(0.3, description="Least accuracy of any class.")
    max_negative_flips: Share = Field(
        0.1, description="Largest share of answers that the parent had right and it has wrong."
    )
    min_holdout_per_class: int = Field(
        5, gt=0, description="Hold-out images a class needs before it is judged by itself."
    )
    min_base_accuracy: Share = Field(0.7, description="Least hold-out accuracy of a base version.")


Measured = Literal[
    "accuracy_difference",
    "accuracy_difference_low",
    "agreement",
    "correction_ratio",
    "error_share",
    "latency_ratio",
    "p99_ms",
]


class MetricConfig(_Branch):
    """One metric of an analysis, in Argo Rollouts' words."""

    measure: Measured = Field(
        description="What is measured: the candidate's accuracy less stable's on audit labels, or "
        "the lower bound of that; the share of compared requests answered alike; corrections per "
        "request, over stable's; the share of requests that failed; the 99th percentile inside "
        "the model, over stable's or in milliseconds."
    )
    interval: PositiveSeconds = Field(10.0, description="Seconds from measurement to measurement.")
    initialDelay: float = Field(  # noqa: N815 - Argo's word
        0.0, ge=0, description="Seconds before the first one."
    )
    count: int = Field(1, gt=0, description="Measurements that are taken.")
    successCondition: str = Field(  # noqa: N815
        "", description="When a measurement is good, as in 'result < 0.02'."
    )
    failureCondition: str = Field(  # noqa: N815
        "",
        description="When it is bad; a measurement that is neither good nor bad decides nothing.",
    )
    failureLimit: int = Field(  # noqa: N815
        0, ge=0, description="Bad measurements that are put up with; more abort the rollout."
    )
    inconclusiveLimit: int = Field(  # noqa: N815
        0, ge=0, description="Undecided ones that are put up with; more pause the rollout."
    )

    @field_validator("successCondition", "failureCondition")
    @classmethod
    def _is_a_condition(cls, text: str) -> str:
        if text.strip():
            Condition.parse(text)
        return text

    @model_validator(mode="after")
    def _can_decide(self) -> Self:
        if not (self.successCondition.strip() or self.failureCondition.strip()):
            raise ValueError(
                "a metric needs a successCondition or a failureCondition, or it can never decide"
            )
        if self.failureLimit >= self.count and self.inconclusiveLimit >= self.count:
            raise ValueError(
                f"failureLimit {self.failureLimit} and inconclusiveLimit {self.inconclusiveLimit} "
                f"are not below count {self.count}, so that every result would be a success"
            )
        return self


class StepConfig(_Branch):
    """One step of a rollout, in Argo Rollouts' words.

    Exactly one of `shadow`, `setWeight`, `pause` and `analysis` is given.
    """

    shadow: Share | None = Field(None, description="Share of requests copied to the candidate.")
    setWeight: Annotated[int, Field(ge=0, le=100)] | None = Field(  # noqa: N815 - Argo's word
        None, description="Per cent of requests the candidate answers."
    )
    pause: PositiveSeconds | None = Field(None, description="Seconds to wait.")
    analysis: tuple[MetricConfig, ...] | None = Field(
        None, description="Metrics that must come to a success before the step may end."
    )
    min_requests: int = Field(
        50, ge=0, description="Requests the candidate must have seen before the step may end."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        known = ("shadow", "setWeight", "pause", "analysis")
        kinds = [kind for kind in known if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"a step has exactly one of {', '.join(known)}; got {kinds}")
        return self


def check_steps(steps: Sequence[StepConfig]) -> None:
    """Refuse steps that can never end.

    Raises:
        ValueError: If a step waits for what cannot come to a candidate that is asked nothing.
    """
    weight, shadow, compared = 0, 0.0, False
    for number, step in enumerate(steps, 1):
        weight = weight if step.setWeight is None else step.setWeight
        shadow = shadow if step.shadow is None else step.shadow
        compared |= 0 < weight < 100
        measures = {metric.measure for metric in step.analysis or ()}
        if "correction_ratio" in measures and not compared:
            raise ValueError(
                f"step {number} can never end: it waits for a correction_ratio, but users correct "
                "only answers that they see, and no setWeight between 1 and 99 lets them see those "
                "of both versions before it"
            )
        if weight or shadow:
            continue
        waits = step.min_requests and "its min_requests"
        if step.analysis:
            waits = "its analysis"
        if waits:
            raise ValueError(
                f"step {number} can never end: the candidate is asked nothing in it, with weight 0 "
                f"and shadow 0, and {waits} would wait for answers; put a shadow or a setWeight "
                "above 0 before it, or set min_requests to 0"
            )


class RolloutConfig(_Branch):
    """From candidate to stable."""

    steps: tuple[StepConfig, ...] = Field(
        (
            StepConfig(shadow=0.5),
            StepConfig(setWeight=5),
            StepConfig(setWeight=20),
            StepConfig(setWeight=50),
            StepConfig(setWeight=100),
        ),
        description="What happens in which order; after the last step the audit labels decide.",
    )
    analysis: tuple[MetricConfig, ...] = Field(
        (), description="Metrics that are measured from the first share on, beside the steps."
    )
    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Largest share of false promotions, however often one looks."
    )
    margin: Share = Field(
        0.02, description="Accuracy the candidate may lose and still be promoted."
    )
    min_labelled_pairs: int = Field(
        50, gt=0, description="Audit labels that a promotion needs at least."
    )
    evidence: Literal["audit", "corrections"] = Field(
        "audit",
        description="What a promotion rests on: labels of the audit share, or, where nobody gives "
        "any, how often users correct either version in requests without a session.",
    )
    max_correction_ratio: float = Field(
        1.25,
        gt=1,
        description="Corrections per request over stable's at which the candidate counts as worse.",
    )
    min_corrections: int = Field(
        50, gt=0, description="Corrections of either version that a promotion needs at least."
    )
    max_error_share: Share = Field(0.02, description="Candidate errors that abort.")
    max_latency_ratio: float = Field(
        5.0, gt=0, description="p99 inside the candidate over p99 inside stable that pauses."
    )
    sample_ratio_alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.001,
        description="Largest share of rollouts paused because requests seem not to be split by "
        "weight although they are, however often one looks.",
    )
    slot_max_weight: Annotated[int, Field(ge=0, le=100)] = Field(
        20, description="Up to this weight a slot answers; above, the fronts do, in process."
    )
    lease_s: PositiveSeconds = Field(10.0, description="How long a silent controller holds on.")
    heartbeat_timeout_s: PositiveSeconds = Field(
        5.0, description="A front silent for this long no longer has to acknowledge."
    )

    @field_validator("steps")
    @classmethod
    def _can_end(cls, steps: tuple[StepConfig, ...]) -> tuple[StepConfig, ...]:
        check_steps(steps)
        return steps


class ExperimentConfig(_Branch):
    """Several versions side by side."""

    alpha: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="Share of the intervals in a result that may miss the truth, each alone."
    )
    interval_s: PositiveSeconds = Field(
        60.0,
        description="Seconds from one result so far to the next; adaptive weights change as often. "
        "Requests of a front that dies are lost for so long.",
    )


Day = Literal["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"]
_CLOCK = r"^([01]\d|2[0-3]):[0-5]\d$"


class OffPeakConfig(_Branch):
    """Bounds of a deployment's replicas in quiet hours, in UTC."""

    start: Annotated[str, Field(pattern=_CLOCK)] = Field("22:00", description="When they begin.")
    end: Annotated[str, Field(pattern=_CLOCK)] = Field(
        "06:00", description="When they end; earlier than start means on the next day."
    )
    days: tuple[Day, ...] = Field(
        ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"), description="On which they begin."
    )
    min_replicas: int = Field(0, ge=0, description="Fewest replicas.")
    max_replicas: int = Field(1, gt=0, description="Most replicas.")

    @model_validator(mode="after")
    def _has_bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"off-peak min_replicas {self.min_replicas} is above max_replicas "
                f"{self.max_replicas}"
            )
        if self.start == self.end:
            raise ValueError(
                f"off-peak hours from {self.start} to {self.end} have no length; for a whole day "
                "set min_replicas and max_replicas themselves"
            )
        return self


class AutoscalingConfig(_Branch):
    """Replicas of one deployment, and how they compute."""

    min_replicas: int = Field(1, ge=0, description="Fewest replicas; 0 lets it go to sleep.")
    max_replicas: int = Field(2, gt=0, description="Most replicas.")
    target_ongoing_requests: float = Field(
        16, gt=0, description="Requests in flight per replica at which their number stays."
    )
    upscale_delay_s: float = Field(
        10.0, ge=0, description="How long more must be wanted before there are more."
    )
    downscale_delay_s: float = Field(
        300.0, ge=0, description="How long fewer must be wanted before there are fewer."
    )
    off_peak: OffPeakConfig | None = Field(
        None, description="Other bounds in quiet hours, such as {start: '22:00', min_replicas: 0}."
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Labels of the nodes that replicas may run on, as Ray selects them, such as "
        "{market: on-demand} or {market: '!spot'}.",
    )
    num_cpus: float = Field(0.2, ge=0, description="CPUs reserved per replica.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs reserved per replica; may be a fraction.")
    precision: Precision = Field(
        "fp32",
        description="Arithmetic of the answers. A version answers in bf16 or int8 only if it "
        "passed the gate in it, so train with the same setting; else it answers in fp32.",
    )

    @model_validator(mode="after")
    def _has_bounds(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}"
            )
        return self


class ServingConfig(_Branch):
    """The HTTP application."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, lt=65536, description="HTTP port.")
    model_name: str = Field("classifier", description="Name in the Open Inference Protocol.")
    front: AutoscalingConfig = AutoscalingConfig()
    slot: AutoscalingConfig = AutoscalingConfig(min_replicas=0, max_replicas=1)
    max_ongoing_requests: int = Field(256, gt=0, description="Per replica, before Ray queues.")
    model_threads: int = Field(
        1, gt=0, description="CPU threads of each replica's model; more replicas use more cores."
    )
    model_process: bool = Field(
        True,
        description="Run each replica's models in a process of their own beside the one that takes "
        "HTTP: the most requests per second, for the memory of one more process.",
    )
    max_batch: int = Field(32, gt=0, description="Images per forward pass.")
    batch_wait_s: float = Field(
        0.01,
        ge=0,
        description="Longest wait for a fuller batch, which is also never longer than 3 % of what "
        "the batch before took.",
    )
    max_queue: int = Field(512, gt=0, description="Images waiting; beyond it 429.")
    poll_interval_s: PositiveSeconds = Field(0.25, description="How often the document is read.")
    slot_timeout_s: PositiveSeconds = Field(
        2.0, description="A slot slower than this is an error; stable answers instead."
    )
    cache_bytes: int = Field(
        16_000_000,
        ge=0,
        description="Memory of each front for answers about pixels it has seen, by version; 0 "
        "keeps none.",
    )
    shadow_queue: int = Field(64, ge=0, description="Copies waiting for a slot; beyond, dropped.")
    top_k: int = Field(5, gt=0, description="Classes listed in an answer.")

    @property
    def precisions_to_prove(self) -> tuple[Precision, ...]:
        """Precisions that answers are given in and that are not the one of training."""
        used: set[Precision] = {self.front.precision, self.slot.precision}
        return tuple(sorted(used - {"fp32"}))


class TrainingConfig(_Branch):
    """Where Ray Train runs."""

    num_workers: int = Field(1, gt=0, description="Training processes.")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs reserved per process.")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs reserved per process; 0 trains on the CPU."
    )
    max_failures: int = Field(2, ge=0, description="Worker losses survived from the checkpoint.")
    checkpoint_every_epochs: int = Field(
        10, gt=0, description="Epochs between checkpoints; an interruption costs at most so many."
    )


class TuningConfig(_Branch):
    """The sweep over lambda_ewc and learning rate."""

    num_trials: int = Field(6, gt=0, description="Trials per Fisher estimator.")
    estimators: tuple[Literal["exact", "sampled", "empirical"], ...] = Field(
        (),
        description="Fisher estimators to compare, each with trials of its own, since a weight "
        "found with one means nothing with another; empty takes the stable version's.",
    )
    lambda_ewc: tuple[float, float] = Field((0.1, 1_000.0), description="Log-uniform range.")
    learning_rate: tuple[float, float] = Field((5e-4, 1e-2), description="Log-uniform range.")
    min_retention: Share = Field(0.95, description="Trials below it cannot win.")
    max_concurrent: int = Field(1, gt=0, description="Trials that run at the same time.")

    @field_validator("lambda_ewc", "learning_rate")
    @classmethod
    def _is_a_range(cls, ends: tuple[float, float]) -> tuple[float, float]:
        low, high = ends
        if not 0 < low < high < math.inf:
            raise ValueError(
                "a log-uniform range goes from a positive number to a larger one; to try no EWC, "
                "set learning.update.ewc.lambda_ewc to 0 for a run of train_job.py"
            )
        return ends


class Config(_Branch):
    """The whole tree."""

    store: StoreConfig = StoreConfig()
    data: DataConfig = DataConfig()
    images: ImageConfig = ImageConfig()
    model: ModelConfig = ModelConfig()
    learning: LearningConfig = LearningConfig()
    feedback: FeedbackConfig = FeedbackConfig()
    drift: DriftConfig = DriftConfig()
    gate: GateConfig = GateConfig()
    rollout: RolloutConfig = RolloutConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    serving: ServingConfig = ServingConfig()
    training: TrainingConfig = TrainingConfig()
    tuning: TuningConfig = TuningConfig()


def load_config(path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Read the tree from a YAML file, overrides and the environment, in rising priority.

    Args:
        path: YAML file; None means the defaults.
        overrides: ``section.key=value`` strings; values are YAML.

    Raises:
        ConfigError: If the file cannot be read or a key or value is not acceptable; an
            unknown key is answered with the nearest known one.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"config file {path} does not exist; conf/local.yaml is the one to start from"
            ) from None
        except OSError as error:
            raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"config file {path} is not UTF-8 text: {error}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"config file {path} is not YAML: {error}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"config file {path} holds {type(loaded).__name__}, not sections")
        tree = loaded or {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        try:
            _put(tree, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of override {override!r} is not YAML: {error}") from None
    for variable, key in (
        ("LIFELONG_STORE_URL", "url"),
        ("LIFELONG_S3_ENDPOINT_URL", "endpoint_url"),
    ):
        if os.environ.get(variable):
            _put(tree, ["store", key], os.environ[variable])
    return config_from(tree)


def config_from(tree: dict[str, Any]) -> Config:
    """Check a tree of plain values; raises `ConfigError` with the nearest known key.

    What it does not name stays at the default of its place: two trainings are of one class,
    but have defaults of their own.
    """
    try:
        return Config.model_validate(_laid_over(Config().model_dump(), tree))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(dict(item)) for item in error.errors())) from None


def _laid_over(defaults: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged, values replaced; unknown keys are kept for the check to find."""
    merged = dict(defaults)
    for key, value in tree.items():
        known = defaults.get(key)
        if isinstance(known, dict) and isinstance(value, dict):
            merged[key] = _laid_over(known, value)
        else:
            merged[key] = value
    return merged


_HEADER = """\
# Every setting at its default: one machine, local disk, CPU. Any key may be left out; unknown
# keys are errors. --set section.key=value overrides one key. The secrets LIFELONG_SIGNING_KEY
# and LIFELONG_ADMIN_TOKEN come from the environment only.

"""


def default_file() -> str:
    """The text of a configuration file with every setting at its default."""
    return _HEADER + commented_yaml(Config()) + "\n"


def commented_yaml(config: BaseModel, indent: str = "") -> str:
    """Write a tree as YAML with each field's description above it.

    >>> print(commented_yaml(StoreConfig(url="runs/store")).splitlines()[-1])
    endpoint_url: ""
    """
    lines: list[str] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        text = field.description or inspect.cleandoc(type(value).__doc__ or "").split("\n")[0]
        lines += textwrap.wrap(
            text, 96, initial_indent=indent + "# ", subsequent_indent=indent + "# "
        )
        if isinstance(value, BaseModel):
            lines += [f"{indent}{name}:", commented_yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_inline(value)}")
        if not indent:
            lines.append("")
    return "\n".join(lines).rstrip("\n")


def _inline(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, BaseModel):  # one step of a rollout
        given = value.model_dump(exclude_unset=True)
        return f"{{{', '.join(f'{k}: {_inline(v)}' for k, v in given.items())}}}"
    return json.dumps(value) if value == "" or not isinstance(value, str) else value


def _put(tree: dict[str, Any], keys: list[str], value: object) -> None:
    *sections, last = keys
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys)} goes through {section}, which is a value")
    tree[last] = value


def _explain(item: dict[str, Any]) -> str:
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _keys_beside(path)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        hint = f"; the nearest known key is {near[0]}" if near else ""
        return f"unknown config key {name}{hint}"
    return f"config key {name} is {item.get('input')!r}: {item['msg']}"


def _keys_beside(path: list[str]) -> list[str]:
    """Known keys of the section that holds the last part of `path`."""
    section: type[BaseModel] = Config
    for part in path[:-1]:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type):
            return list(StepConfig.model_fields) if "steps" in path else []
        if issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)
