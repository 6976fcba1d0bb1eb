"""The typed configuration: one model per top-level key of ``conf/*/parameters*.yml``.

``read_parameters`` validates all of them once, before anything runs. Its error has one line per fault, with the YAML
key. Nothing heavy is imported here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from fedsca_pipeline.errors import ConfigError, faults_by_key, suggestion

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
# What MLflow allows in the name of a metric, and file systems in a path.
ClassName = Annotated[str, StringConstraints(pattern=r"^\w[\w .-]{0,39}$", strip_whitespace=True)]
Positive = Annotated[float, Field(gt=0.0)]

MAX_IMAGE_SIZE = 4096
"""Largest ``preprocessing.image_size``."""

T = TypeVar("T")
OrAuto = Annotated[T | None, BeforeValidator(lambda value: None if value == "auto" else value)]
"""A value, or ``auto``, which is None here: a union with a literal would report two faults for one."""

OneOrMore = Annotated[T, BeforeValidator(lambda value: [value] if isinstance(value, str | int | float) else value)]
"""A list, or its one entry alone, as ``--params`` gives it."""


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class RunConfig(_Config):
    """``run``: parameters that every stage shares."""

    seed: int = Field(0, ge=0, description="the one seed; every random stream is derived from it")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: int | None = Field(None, ge=1, description="torch threads; null: all cores that this process may use")


class DemoSitesConfig(_Config):
    """``demo_sites``: phantom hospitals, written if there is no raw data."""

    images_per_site: int = Field(40, ge=4, le=10_000)
    image_size: int = Field(256, ge=32, le=2048, description="pixels, both sides")
    seed: int = Field(2503, ge=0)
    anyway: bool = Field(False, description="train on them although an import was tried or is configured")


class NormaliseConfig(_Config):
    """``preprocessing.normalise``: how raw intensities become 0..255."""

    method: Literal["percentile", "minmax", "window", "none"] = "percentile"
    lower: float = Field(1.0, ge=0.0, le=100.0, description="percentile")
    upper: float = Field(99.5, ge=0.0, le=100.0, description="percentile")
    window_centre: float | None = Field(None, description="raw units, for method: window")
    window_width: Positive | None = Field(None, description="raw units, for method: window")

    @model_validator(mode="after")
    def _consistent(self) -> NormaliseConfig:
        if self.method == "percentile" and self.lower >= self.upper:
            raise ValueError(f"lower ({self.lower}) must be below upper ({self.upper})")
        if self.method == "window" and (self.window_centre is None or self.window_width is None):
            raise ValueError("method: window needs window_centre and window_width")
        return self


class SplitConfig(_Config):
    """``preprocessing.split``: drawn once, by subject. Below 1 a value is a share of the site, else a number."""

    validation: float = Field(0.15, ge=0.0, description="below 1 a share of the site's images, else a number of them")
    test: float = Field(0.25, ge=0.0, description="below 1 a share of the site's images, else a number of them")
    max_train: int | None = Field(None, ge=1, description="keep at most this many training images; null keeps all")
    overrides: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="by site: {validation: .., test: ..}"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SplitConfig:
        for site, counts in {"": {"validation": self.validation, "test": self.test}, **self.overrides}.items():
            where = f"overrides.{site}" if site else "split"
            if unknown := set(counts) - {"validation", "test"}:
                raise ValueError(f"{where}: unknown {sorted(unknown)}; only validation and test may be named")
            if any(value < 0 for value in counts.values()):
                raise ValueError(f"{where}: negative counts make no sense")
            if any(value >= 1 and not float(value).is_integer() for value in counts.values()):
                raise ValueError(f"{where}: from 1 on a count is a whole number of images")
            shares = [value for value in counts.values() if value < 1]
            if sum(shares) >= 1:
                raise ValueError(f"{where}: validation and test together take {sum(shares):.2f} of the images")
        return self


class VolumeConfig(_Config):
    """``preprocessing.volume``: how a volume is cut into slices, each of which is an image."""

    axis: Literal[0, 1, 2] = Field(2, description="axis of RAS+ to cut along: 0 sagittal, 1 coronal, 2 axial slices")
    channels: Literal[1, 3] = Field(1, description="1: the slice alone; 3: the slice between its two neighbours")
    modalities: OneOrMore[list[Annotated[int, Field(ge=0)]]] | None = Field(
        None,
        min_length=1,
        max_length=3,
        description="indices of the fourth axis, used as channels; null: the volume has three axes",
    )
    empty_slices: Fraction = Field(1.0, description="share of a training volume's slices without foreground to keep")

    @model_validator(mode="after")
    def _three_channels(self) -> VolumeConfig:
        if self.channels == 3 and len(self.modalities or ()) > 1:
            raise ValueError("channels: 3 takes neighbouring slices of one modality; name one, or set channels: 1")
        return self


class DecodeConfig(_Config):
    """``preprocessing.decode``: limits of the process that decodes one file; a file beyond them is broken."""

    memory: int = Field(1024, ge=64, le=2**20, description="MiB, beyond the image's own size")
    seconds: float = Field(60.0, gt=0.0, description="of processor time, and of wall time")


class PreprocessingConfig(_Config):
    """``preprocessing``: from raw site folders to cached arrays."""

    image_size: int = Field(
        256, ge=16, le=MAX_IMAGE_SIZE, multiple_of=16, description="pixels; images are padded to a square"
    )
    classes: int = Field(1, ge=1, le=254, description="K, the number of foreground classes")
    class_names: OneOrMore[tuple[ClassName, ...]] | None = Field(
        None, description="K names, class 1 first, for tables, figures and metrics; null: class 1, class 2, ..."
    )
    normalise: NormaliseConfig = NormaliseConfig()
    volume: VolumeConfig = VolumeConfig()
    split: SplitConfig = SplitConfig()
    decode: DecodeConfig = DecodeConfig()
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    allow_empty_masks: bool = True
    min_images: int = Field(4, ge=3, description="a site with fewer usable images is broken")

    @model_validator(mode="after")
    def _named(self) -> PreprocessingConfig:
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(
                f"class_names: {len(self.class_names)} names for {self.classes} classes; name each, or none"
            )
        if self.class_names is not None and len(set(self.class_names)) < self.classes:
            raise ValueError("class_names: two classes have one name")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes, class 1 first."""
        return self.class_names or tuple(f"class {label}" for label in range(1, self.classes + 1))


class DataReportConfig(_Config):
    """``data_report``: what it shows of the raw data, and which images it calls near duplicates."""

    thumbnails: int = Field(24, ge=0, le=96, description="images shown per site")
    near_duplicate_bits: int = Field(
        32,
        ge=0,
        le=96,
        description="largest number of different bits, of 256, between the hashes of near duplicates",
    )
    embedding: bool = Field(True, description="compute the foundation's features, for the distance between sites")
    embedded_images: int = Field(32, ge=4, le=4096, description="images per site, drawn by the seed")


class FoundationConfig(_Config):
    """``foundation``: the frozen pretrained model."""

    name: Literal["mobile_sam", "sam", "random"] = "mobile_sam"
    source: str | None = Field(None, description="for sam: a local folder or a Hugging Face id")
    architecture: Literal["tiny_vit", "sam_vit"] = Field("tiny_vit", description="for random: the architecture")
    seed: int = Field(0, ge=0, description="for random: seed of its weights")
    head: Literal["sigmoid", "softmax"] = Field(
        "sigmoid", description="K independent foreground channels, or softmax over background and K classes"
    )

    @model_validator(mode="after")
    def _consistent(self) -> FoundationConfig:
        if self.name == "sam" and not self.source:
            raise ValueError("name: sam needs source, a local folder or a Hugging Face id")
        return self


class AdaptersConfig(_Config):
    """``adapters``: FEL, the parameter-efficient part."""

    method: str = Field("fel", description="fel, lora, or any PEFT method that attaches to linear layers")
    width: int | None = Field(None, ge=1, le=1024, description="fel: bottleneck width; null: 32 or 64 by embedding")
    scale: Positive = Field(0.5, description="fel: of the adapter beside the MLP (docs/method.md)")
    seed: int = Field(0, ge=0, description="of the down projections, shared by all sites")
    options: dict[str, Any] = Field(default_factory=dict, description="further fields of the PEFT config, e.g. {r: 4}")


class AugmentConfig(_Config):
    """``training.augment``: probabilities and strengths, per image."""

    flip: Fraction = 0.5
    rotate90: Fraction = 0.75
    intensity: Fraction = Field(0.0, description="probability; above 0 the features of training images are not cached")
    brightness: float = Field(0.1, ge=0.0, le=1.0, description="largest relative change of brightness")
    contrast: float = Field(0.25, ge=0.0, lt=1.0, description="largest relative change of gamma")


class PrivacyBound(_Config):
    """Largest privacy loss of any unit of a site over all runs that it takes part in (docs/privacy.md)."""

    epsilon: float = Field(gt=0.0, le=1000.0)
    delta: float = Field(1e-5, gt=0.0, lt=1.0)


class PrivacyConfig(_Config):
    """``training.privacy``: differential privacy inside the sites (docs/privacy.md)."""

    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)] | None = Field(
        None, description="of one run, per unit of a site; sets the noise; null: no differential privacy"
    )
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="below 1 / (units of the largest site)")
    clip: Positive = Field(1.0, description="norm that each unit's gradient is clipped to, over all trained tensors")
    budget: Annotated[float, Field(gt=0.0, le=1000.0)] | None = Field(
        None, description="largest epsilon over all runs of a site, which then refuses; null: no limit"
    )


class TrainingConfig(_Config):
    """``training``: local training of one site in one round."""

    local_epochs: int = Field(1, ge=1, le=100)
    steps_per_round: int | None = Field(
        None, ge=1, le=100_000, description="local steps per round for any number of images; null: local_epochs decides"
    )
    batch_size: int = Field(2, ge=1, le=1024)
    learning_rate: Positive = Field(1e-3, le=1.0, description="AdamW, adapters")
    decoder_factor: float = Field(0.3, ge=0.0, le=10.0, description="decoder learning rate / adapter learning rate")
    warmup_steps: int = Field(
        4,
        ge=0,
        le=10_000,
        description="steps at the start of each round in which the rate rises, because AdamW restarts",
    )
    weight_decay: float = Field(1e-4, ge=0.0, le=1.0)
    clip_norm: Positive = 1.0
    dice_weight: Fraction = Field(0.5, description="loss = w Dice + (1 - w) cross-entropy")
    keep_optimizer: bool = Field(False, description="keep AdamW's moments of the private tensors between rounds")
    feature_cache: float = Field(
        4.0, ge=0.0, description="GiB on disk for cached features of the frozen encoder prefix, over all sites; 0: none"
    )
    augment: AugmentConfig = AugmentConfig()
    privacy: PrivacyConfig = PrivacyConfig()

    def times(self, sites: int) -> TrainingConfig:
        """Return the training of one site that holds the images of ``sites``: as many steps as theirs together."""
        return (
            self
            if self.steps_per_round is None
            else self.model_copy(update={"steps_per_round": self.steps_per_round * sites})
        )


class FederationConfig(_Config):
    """``federation``: the rounds."""

    strategy: str = "fedsca"
    rounds: int = Field(8, ge=1, le=100_000)
    participation: float = Field(1.0, gt=0.0, le=1.0, description="share of the sites that take part in each round")
    quorum: int = Field(
        1, ge=1, description="fewest valid replies of a round; always 1 for a strategy that pools the sites"
    )
    wire_dtype: Literal["fp32", "fp16", "int8"] = "fp16"
    compression: Literal["zstd", "none"] = Field("zstd", description="of every message; both kinds can be read")
    max_norm_ratio: float = Field(10.0, gt=1.0, description="an update this many times the median norm is rejected")
    clip_to_median: bool = Field(
        False, description="whether longer updates are shortened to the median norm of their round"
    )
    max_share: float = Field(
        0.5, gt=0.0, le=1.0, description="largest share of one site in the prior of any mix; of K sites at least 1/K"
    )
    server_memory: float = Field(
        4.0, ge=0.0, description="GiB for the server's arrays [sites, values]; the rest is on disk"
    )
    fleet: Literal["in_process", "processes", "flower"] = "in_process"
    deadline: Positive | None = Field(
        None, description="for fleet flower: seconds until a silent site counts as absent; null: never"
    )
    grace: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="for fleet flower: seconds a round waits for more replies after the quorum; null: deadline"
    )
    workers: OrAuto[Annotated[int, Field(ge=1)]] = Field(None, description="for fleet processes: number of workers")
    devices: OrAuto[OneOrMore[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]]] = Field(
        None, description="for fleet processes: numbers of the CUDA devices to use"
    )
    inject_failures: dict[str, OneOrMore[list[int]]] = Field(
        default_factory=dict, description="for tests: site: [rounds] in which it fails"
    )

    def drawn(self, sites: int) -> int:
        """Return how many of ``sites`` take part in a round: their share, rounded, and at least one."""
        return max(1, math.floor(self.participation * sites + 0.5))

    def pooled(self) -> FederationConfig:
        """Return the parameters for one pooled site: its answer alone is a quorum."""
        return self.model_copy(update={"quorum": 1})


class EvaluationConfig(_Config):
    """``evaluation``: test metrics, tables and figures."""

    batch_size: int = Field(8, ge=1, le=1024)
    threshold: float = Field(
        0.5, gt=0.0, lt=1.0, description="sigmoid head: probability above which a pixel is foreground"
    )
    every: int = Field(
        1, ge=1, le=100_000, description="rounds between validations; the last round is always validated"
    )
    after_training: bool = Field(True, description="whether a site also validates right after local training")
    surface_tolerance: Positive = Field(2.0, description="mm; surfaces of volumes closer than this agree (NSD)")


class PredictConfig(_Config):
    """``predict``: new images, segmented by a site's finished model."""

    model: str | None = Field(None, description="name of a site, or the folder of a model")
    source: str | None = Field(None, description="an image, or a folder of images, which is searched to the bottom")
    output: str | None = Field(None, description="folder of the results; null: 07_model_output/predicted/<model>")
    batch_size: int = Field(8, ge=1, le=1024, description="images, or slices of a volume, per forward pass")
    overlays: bool = Field(True, description="also write each image with the outlines of its mask")
    probabilities: bool = Field(False, description="also write the probability of each class")


class MethodConfig(_Config):
    """``comparison.methods.<name>``: one row of the comparison, a strategy or a variant of one."""

    strategy: str | None = Field(None, description="a key of strategies; null: the name of the row")
    options: dict[str, Any] = Field(default_factory=dict, description="options that override strategies.<strategy>")
    set: dict[str, Any] = Field(
        default_factory=dict, description="other parameters by dotted key, e.g. {adapters.method: lora}"
    )
    ablation: str | None = Field(
        None, description="what this variant of the ablated method changes; null: this row is a method"
    )
    tuned: str | None = Field(None, description="what was chosen before the grid, and how; shown on the page")
    seeds: OneOrMore[list[Annotated[int, Field(ge=0)]]] | None = Field(
        None, min_length=1, description="null: the comparison's"
    )
    train_images: OneOrMore[list[int | None]] | None = Field(None, min_length=1, description="null: the comparison's")
    learning_rates: OneOrMore[list[Positive]] | None = Field(
        None,
        min_length=1,
        description="to choose from; null: the comparison's; an ablation uses the ablated method's choice",
    )


class ComparisonConfig(_Config):
    """``comparison``: the grid of methods, seeds and numbers of training images."""

    methods: dict[str, MethodConfig | None] = Field(default_factory=dict)
    only: OneOrMore[list[str]] | None = Field(
        None, min_length=1, description="names of the methods to compare; null: all"
    )
    reference: str = Field("fedsca", description="the method that all others are tested against")
    ablated: str | None = Field(None, description="the method that entries with ablation vary; null: the reference")
    seeds: OneOrMore[list[Annotated[int, Field(ge=0)]]] = Field([0, 1, 2], min_length=1)
    train_images: OneOrMore[list[Annotated[int, Field(ge=1)] | None]] = Field(
        [None], min_length=1, description="training images a site; null: all it has"
    )
    learning_rates: OneOrMore[list[Positive]] = Field(
        default_factory=list,
        description="each method chooses one by validation on its first seed; []: training.learning_rate",
    )
    unseen_sites: OneOrMore[list[str]] = Field(default_factory=list, description="sites that never train")
    leave_one_out: bool = Field(False, description="each site in turn is also left out and unseen")
    shots: OneOrMore[list[Annotated[int, Field(ge=1)]]] = Field(
        [1, 2, 4, 16], description="labelled images of an unseen site to tune on; at most 0.4 of its images"
    )
    shot_steps: int = Field(20, ge=1, le=100_000, description="local steps of that tuning")
    release_private: bool = Field(
        False, description="sites give their whole models to an unseen site, which averages their probabilities"
    )
    same_code: bool = Field(True, description="false: finished cells of other code versions count and are marked")
    jobs: OrAuto[Annotated[int, Field(ge=1)]] = Field(None, description="cells at once")

    @model_validator(mode="after")
    def _known_names(self) -> ComparisonConfig:
        for name in self.only or ():
            if name not in self.methods:
                raise ValueError(f"only: {name!r} is no method{suggestion(name, self.methods)}")
        needed = {"reference": self.reference}
        if any(method.ablation for method in self.chosen.values()):
            needed["ablated"] = self.varied
        for key, name in needed.items():
            if name not in self.chosen:
                raise ValueError(f"{key}: {name!r} is not among the methods: {', '.join(self.chosen)}")
        return self

    @property
    def varied(self) -> str:
        """The method that ablations vary."""
        return self.ablated or self.reference

    @property
    def chosen(self) -> dict[str, MethodConfig]:
        """The methods to compare, by name, in the order of the YAML."""
        return {
            name: method or MethodConfig()
            for name, method in self.methods.items()
            if self.only is None or name in self.only
        }


class Settings(_Config):
    """The parameter groups that decide a run's numbers, as one frozen object.

    Nodes, a comparison's cells and a hospital's worker receive it, and ``federation.setup`` builds a model from it.
    """

    run: RunConfig = RunConfig()
    preprocessing: PreprocessingConfig = PreprocessingConfig()
    foundation: FoundationConfig = FoundationConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    strategies: dict[str, dict[str, Any]] = Field(default_factory=dict, description="options by name of the strategy")

    @field_validator("strategies", mode="before")
    @classmethod
    def _empty_means_defaults(cls, strategies: Any) -> Any:
        return (
            {name: options or {} for name, options in strategies.items()}
            if isinstance(strategies, dict)
            else strategies
        )

    @property
    def strategy_options(self) -> dict[str, Any]:
        """Options of the chosen strategy."""
        return self.strategies.get(self.federation.strategy, {})

    def pooled(self, sites: int) -> Settings:
        """Return the settings of the one site that holds the images of all ``sites``."""
        return self.model_copy(update={"training": self.training.times(sites), "federation": self.federation.pooled()})


GROUPS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {name: field.annotation for name, field in Settings.model_fields.items() if name != "strategies"}  # type: ignore[misc]  # every annotation is a model
)
"""The models of ``Settings`` by name, without ``strategies``, whose options each strategy checks itself."""


class Parameters(Settings):
    """Everything that ``conf/*/parameters*.yml`` and ``--params`` may hold."""

    demo_sites: DemoSitesConfig = DemoSitesConfig()
    data_report: DataReportConfig = DataReportConfig()
    comparison: ComparisonConfig | None = None
    predict: PredictConfig = PredictConfig()
    force: bool = False
    importer: str | None = None
    source: str | None = None
    hide_names: bool = Field(False, description="true: import under salted-hash names")
    import_options: dict[str, Any] = Field(default_factory=dict)
    site: str | None = Field(None, description="the site that forget_site deletes")
    delete_raw: bool = Field(False, description="true: forget_site deletes the raw data as well")
    flower: dict[str, Any] | None = Field(None, description="checked by flower.config, of env flower")
    data_root: str | None = Field(None, description="read by the catalog")
    foundation_root: str | None = Field(None, description="read by the catalog")

    @property
    def settings(self) -> Settings:
        """The groups that decide a run's numbers."""
        return Settings(**{name: getattr(self, name) for name in Settings.model_fields})


def read_parameters(raw: Mapping[str, Any]) -> Parameters:
    """Return the validated parameters.

    Raises:
        ConfigError: one line per fault, each with its YAML key.
    """
    for key in raw:
        if key not in Parameters.model_fields:
            raise ConfigError(f"{key} is no parameter{suggestion(key, Parameters.model_fields)}")
    try:
        return Parameters.model_validate(dict(raw))
    except ValidationError as error:
        raise ConfigError("\n".join(faults_by_key(error))) from error
