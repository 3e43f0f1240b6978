"""All settings of a run: frozen dataclasses with a sentence under each field.

pydantic does the typing. `reading.py` reads them from presets, YAML files and command lines.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tempflow.settings.declare import (
    Count,
    Fraction,
    Name,
    NonNegative,
    Positive,
    Precision,
    Seconds,
    Steps,
    Whole,
    changeable,
    section,
)
from tempflow.settings.spread import ParallelConfig
from tempflow.settings.tails import TailConfig


@section
class ModelConfig:
    path: str = "tempflow:digits/pipeline"
    """Folder of a diffusers pipeline, or a hub id; `tempflow:...` is a folder shipped with the package."""
    dtype: Precision = "fp32"
    """Precision of the transformer; latents, log-probabilities and trained parameters are always fp32."""
    text_dtype: Precision | None = None
    """Precision of the text encoders; null takes model.dtype."""
    vae_dtype: Precision | None = None
    """Precision of the image decoder; null takes bf16 on a GPU and model.dtype on a CPU. fp16 may give black images."""
    text_tokens: Count = 256
    """Length of the text sequence (`max_sequence_length` of the diffusers pipeline); longer texts are cut there."""
    text_cache: str | None = None
    """Folder in which encoded texts are kept from run to run; null keeps them in memory only."""
    offload_text: bool = False
    """Keep the text encoders in main memory except while new texts are encoded."""
    attention: str = "auto"
    """Attention backend, by its name in diffusers; auto measures on a GPU which is fastest, and is native on a CPU."""
    vae_slicing: bool = False
    """Decode one image at a time: less memory."""
    vae_tiling: bool = False
    """Decode large images in tiles that overlap: less memory, not exactly the same images."""
    train: Literal["lora", "full"] = "lora"
    """Train low-rank adapters, or all parameters of the transformer."""
    lora_rank: Count = 32
    """Rank of the adapters."""
    lora_alpha: Positive = 64.0
    """Scale of the adapters: their output is multiplied by lora_alpha / lora_rank."""
    lora_targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Names of the layers that get adapters, or ends of names; null takes those usual for the model's family."""
    lora: str | None = None
    """A LoRA file or folder to start from, of the rank and layers set here; null starts from the base model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward per training row."""


@section
class SampleConfig:
    steps: Steps = 10
    """Denoising steps of a trajectory during training."""
    height: Count | None = None
    """Image height in pixels; null takes the pipeline's default."""
    width: Count | None = None
    """Image width in pixels; null takes the pipeline's default."""
    guidance: NonNegative = 1.0
    """Guidance as the pipeline counts it: classifier-free (SD3, Qwen-Image, klein: > 1; Z-Image: > 0) or embedded."""
    transition: Literal["flow_sde", "dance_sde", "flash_sde", "cps"] = "flow_sde"
    """The stochastic step: Flow-GRPO's SDE, DanceGRPO's, Flash-GRPO's, or coefficients-preserving sampling."""
    noise_level: Positive | Annotated[list[Positive], Field(min_length=1)] = 0.7
    """Noise of the stochastic step: a of Flow-SDE and CPS, eta of Dance-SDE, a factor (released: 1) of Flash-SDE; or a
    list, one for each step but the last."""


@section
class ExploreConfig:
    prompts: Count = 6
    """Prompts of one iteration, over all processes."""
    noises: Count = 4
    """Initial noises (trunks) per prompt, N."""
    siblings: Count = 6
    """Siblings that leave one fork, K; 1 makes each trunk a chain of its own."""
    forks: str | list[int] = "all"
    """Steps where trunks may fork: all that leave a tail, a list such as [0,2,4], first:n, first:50%, or random:n."""
    take: Count | None = None
    """How many of these steps are drawn; null takes all of them."""
    draw: Literal["iteration", "prompt", "slide"] = "iteration"
    """Draw them again each iteration, for each prompt by itself, or slide through them in order, one at a time."""
    every: Count = 1
    """Iterations between two moves of sliding forks."""
    window: Count | Literal["rest"] = 1
    """Stochastic steps in a row that siblings take from a fork; rest goes on to the last step but one."""
    jump: Count | Annotated[list[Count], Field(min_length=1)] = 1
    """Sigmas that a fork's stochastic step spans (E-GRPO): one number, or one for each of explore.forks in order."""


@section
class CreditConfig:
    group: Literal["seed", "prompt", "batch"] = "seed"
    """Branches compared with one another, always within one fork: of one initial noise, of one prompt, or all."""
    std: Literal["group", "global", "unbiased"] = "group"
    """Divide by the group's standard deviation + 1e-4, all branches' of a fork, or the group's unbiased one + 1e-8."""
    clip: Positive = 5.0
    """Advantages are limited to +- this."""
    idle: Literal["keep", "drop"] = "keep"
    """Groups whose rewards do not differ stay in the averages of loss and KL, or are dropped (released SD3 code)."""


@section
class ObjectiveConfig:
    weighting: Literal["noise", "uniform", "inverse_step", "inverse_sensitivity"] | list[NonNegative] = "noise"
    """Scale of a step's policy loss, mean 1: std_k, 1, 1 / step size, std_k / |v_coef_k|; or a list, one a step."""
    ratio: Literal["gaussian", "guard", "undivided"] = "gaussian"
    """The log-ratio: the Gaussian's, GRPO-Guard's (std times its noise term), or Flow-CPS's (without the variance)."""
    clip: Positive = 1e-4
    """Ratios are clipped to 1 +- this; the log-ratio is a mean over latent elements, so this is small."""
    kl: NonNegative = 0.0
    """Weight of the KL divergence to the model before training."""
    kl_divisor: Literal["std", "diffusion"] = "std"
    """KL divides by 2 std^2 = 2 g^2 dt (TempFlow-GRPO), or by 2 g^2 (newest Flow-GRPO), smaller by the step size."""


@section
class LearnConfig:
    iterations: Count = changeable(100)
    """Iterations of explore, credit, learn."""
    max_seconds: Positive | None = changeable(None)
    """End, with an evaluation, after the first iteration past so many seconds, evaluations apart; null: no limit."""
    rows: Count = 4
    """Trunks in one network call of trunk and training; each training row carries the K siblings of its fork."""
    updates: Count = 1
    """Equal shares of the trunks, each with an optimizer step of its own, per inner epoch."""
    updates_by: Literal["trunks", "forks"] = "trunks"
    """An optimizer step takes all forks of its trunks, or one fork after the other, each with a step (G2RPO)."""
    inner_epochs: Count = 1
    """Passes over one iteration's branches, with the true importance ratio from the second update on."""
    noise: Literal["auto", "key", "stored"] = changeable("auto")
    """The loss draws each branch's noise twice from its key, or reads it stored; auto measures on a GPU, a CPU: key."""
    compile: bool = changeable(False)
    """Compile the repeated blocks in trunk and training."""
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = "adamw"
    """AdamW of torch, or of bitsandbytes: moments in 8 bits; paged, they move to the host when the GPU is full."""
    min_8bit_size: Count = 4096
    """8-bit optimizers keep fp32 moments for tensors of fewer elements; low-rank adapters may be so small."""
    lr: Annotated[float, Field(gt=0, le=1)] = 3e-4
    """Learning rate: about what an element moves in a step of AdamW, so never above 1."""
    lr_schedule: Literal["constant", "linear"] = "constant"
    """Keep the learning rate, or let it fall in a straight line to 0 at learn.iterations."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's decay rates of first and second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    skip_limit: Count = changeable(3)
    """The run stops where a gradient is not finite so many times in a row; each is counted and its step not taken."""
    ema_decay: Fraction = 0.9
    """Limit of the moving average's decay, which warms up as (1 + n) / (10 + n); 0 turns the average off."""
    ema_every: Count = 8
    """Optimizer steps between two updates of the moving average."""


@section
class PromptConfig:
    train: str = "tempflow:digits/prompts/train.jsonl"
    """Prompts to train on: a text file with one a line, or JSONL with `prompt` and any metadata for the scorer."""
    test: str | None = "tempflow:digits/prompts/test.jsonl"
    """Held-out prompts for evaluation; null evaluates nothing."""


@section
class RewardConfig:
    name: str | Annotated[dict[str, float], Field(min_length=1)] = "digits"
    """What is optimised: a scorer of tempflow.rewards or `module:attribute` of your own; several as {name: weight}."""
    combine: Literal["sum", "advantages"] = "sum"
    """Several rewards: normalise their weighted sum, or normalise each and take the weighted sum of the advantages."""
    gold: str | list[str] | None = "digits_gold"
    """A second opinion, or a list of them, only watched at evaluation, never optimised."""
    hacking_drop: Positive = changeable(3.0)
    """Warn when gold has fallen and the reward risen by so many standard errors since gold's best evaluation."""
    hacking_stop: bool = changeable(False)
    """Save and stop where that warning is due."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What scorers are made with, by name, such as {pickscore: {path: /models/pickscore, dtype: bf16}}."""
    servers: list[Annotated[str, Field(pattern=r"^https?://[^\s/]+/*$")]] = changeable(make=list)
    """Addresses of `tempflow serve`; what they serve is scored there, anything else here."""
    rows: Count = changeable(128)
    """Images decoded and scored in one call."""
    overlap: bool = changeable(True)
    """Decode and score a chunk while the next one is sampled: on a GPU, and with a scorer on another machine."""
    batch: Count | None = changeable(None)
    """Images of one request; null takes reward.rows, as many as a scorer here gets in one call."""
    requests: Count = changeable(8)
    """Requests in flight at once, over all servers, per process."""
    timeout: Seconds = changeable(120.0)
    """Seconds after which a request without an answer is sent again."""
    patience: Seconds = changeable(600.0)
    """Seconds after a request's first failure until the run saves and stops; other processes wait for it as long."""
    token_file: str | None = changeable(None)
    """File whose first line is the servers' token; null takes the environment variable TEMPFLOW_SCORER_TOKEN."""


@section
class EvalConfig:
    every: Whole = changeable(10)
    """Iterations between evaluations; 0 evaluates only before and after."""
    prompts: Count = 128
    """Held-out prompts per evaluation, spread evenly over the file."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """Denoising steps, ODE only, from fixed noises."""
    noises: Count = 1
    """Initial noises per held-out prompt; its scores are means over them, pictures show the first."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """What the evaluation noises are a function of, apart from run.seed: runs of all seeds are judged on the same."""
    pictures: Count = 8
    """Prompts whose pictures the report shows before and after."""
    gallery: Whole = changeable(40)
    """Evaluations whose pictures are kept small for report.html and trackers, evenly spread; 0 keeps none."""
    gallery_mb: Positive = changeable(8.0)
    """Megabytes that all of these take at most; fewer evaluations are kept where they would take more."""


@section
class RunConfig:
    dir: str = changeable("runs/digits")
    """Folder of everything the run writes."""
    if_taken: Literal["auto", "refuse", "number"] = changeable("auto")
    """Where run.dir holds a run: refuse, or number: take run.dir-2, -3 and so on. auto refuses one that you gave."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """The one number that every random choice of training is a function of."""
    resume: bool | Literal["auto"] = changeable(False)
    """Continue the run in run.dir (the newest of its numbers) from its last checkpoint; auto begins one if none is."""
    save_every: Whole = changeable(50)
    """Iterations between checkpoints; 0 saves only at the end."""
    keep_checkpoints: Count = changeable(2)
    """Checkpoints that stay on disk, the newest; the one with the best gold score stays, too."""
    grace: Seconds = changeable(20.0)
    """Seconds in which a run that a signal asks to end may finish its iteration; then it saves the one before."""
    trackers: list[Literal["tensorboard", "wandb", "trackio", "swanlab"]] = changeable(make=lambda: ["tensorboard"])
    """Where numbers and pictures go besides metrics.jsonl."""
    project: Name = changeable("tempflow")
    """Project in which wandb, trackio and swanlab show the run."""
    plan_only: bool = changeable(False)
    """Print the plan and its cost, then stop."""
    device: Literal["auto", "cpu", "cuda"] = changeable("auto")
    """Where to run; auto takes a GPU if there is one."""
    noise: Literal["auto", "exact", "fast"] = changeable("auto")
    """Normals of GPU kernels: the same bits as on a CPU, or faster ones; auto keeps a checkpoint's, else takes fast."""


@section
class Config:
    model: ModelConfig = Field(default_factory=ModelConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    explore: ExploreConfig = Field(default_factory=ExploreConfig)
    tails: TailConfig = Field(default_factory=TailConfig)
    credit: CreditConfig = Field(default_factory=CreditConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    learn: LearnConfig = Field(default_factory=LearnConfig)
    prompts: PromptConfig = Field(default_factory=PromptConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    run: RunConfig = Field(default_factory=RunConfig)
