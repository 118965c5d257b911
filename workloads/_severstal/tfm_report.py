"""What the thesis behind the original asked of a training run, and what a run does about each of it, as Markdown.

A tick stands where the run's own values meet the requirement; a cross beside the value that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FILE = "tfm_report.md"


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """One thing that was asked."""

    title: str
    met: bool
    value: str
    """What the run has, with the keys to change it."""


def text(config: Any, rows: Sequence[Mapping[str, str]]) -> str:
    """Return the report of a run with these values, whose epochs have ended so far with these rows of its table."""
    lines = [f"# TFM requirements: {config.run_name or config.network.encoder}", ""]
    for heading, found in _sections(config, rows):
        lines += [
            f"## {heading}",
            "",
            *(f"- [{'x' if one.met else ' '}] {one.title}: {one.value}" for one in found),
            "",
        ]
    return "\n".join([*lines, *_scores(rows)])


def _sections(config: Any, rows: Sequence[Mapping[str, str]]) -> Iterator[tuple[str, list[Requirement]]]:
    yield "Training", [*_training(config)]
    yield "Thresholds and metrics", [*_metrics(config, rows)]
    yield "Data and augmentation", [*_data(config)]
    yield "Model", [*_model(config)]
    yield "Reproducibility and records", [*_records(config, rows)]


def _training(config: Any) -> Iterator[Requirement]:
    optimiser, rate = f"{config.optimizer}, {config.weight_decay:g}", f"{config.lr:g}; severstal_lr_pair.yaml runs both"
    clipped = f"clip_norm={config.clip_norm:g}, in true units"
    yield _need("AdamW, weight decay 1e-4", optimiser == "adamw, 0.0001", optimiser)
    yield _need("learning rate 1e-3 or 1e-4", config.lr in (1e-3, 1e-4), rate)
    yield _need("AMP", config.precision != "fp32", f"precision={config.precision}; a CPU computes in bf16 or fp32")
    yield _need("gradient clipping, max norm 1.0", config.clip_norm == 1.0, clipped)
    both = config.loss.bce > 0 and config.loss.dice > 0
    yield _need("BCE + Dice", both, f"loss.bce={config.loss.bce:g}, loss.dice={config.loss.dice:g}")
    schedule = config.lr_schedule == "restarts"
    cycle = f"T_0={config.restart_epochs}, T_mult={config.restart_factor}"
    yield _need("cosine annealing with warm restarts", schedule, cycle if schedule else config.lr_schedule)
    monitor = config.early_stop_metric
    yield _need(
        "best model by mIoU or Dice", monitor in ("val_dice_opt", "val_iou_opt"), f"early_stop_metric={monitor}"
    )
    yield _need("early stopping", config.patience > 0, f"patience={config.patience} epochs")
    yield _need("checkpoints every 10 epochs", config.save_every == 10, f"save_every={config.save_every}")


def _metrics(config: Any, rows: Sequence[Mapping[str, str]]) -> Iterator[Requirement]:
    last = rows[-1] if rows else {}
    for title, columns in {
        "threshold learnt on validation, best F1 and best Dice": ("opt_threshold_f1", "opt_threshold_dice"),
        "scores at the fixed 0.5 and at the optimal threshold": ("val_dice_fixed", "val_dice_opt"),
        "IoU@50, @75, @90": ("iou_50", "iou_75", "iou_90"),
        "AUPRC of the defect class": ("auprc",),
        "Recall@FP/image": ("recall_fp_image",),
    }.items():
        known = [column for column in columns if last.get(column)]
        values = ", ".join(f"{column} {float(last[column]):.4f}" for column in known)
        yield _need(title, len(known) == len(columns), values or "no epoch has ended yet")
    yield _need("threshold frozen for the test", True, "thresholds.json of the checkpoint, with the validation's hash")
    yield _need("empty strips", True, f"one without a defect that is left alone scores: empty={config.empty}")


def _data(config: Any) -> Iterator[Requirement]:
    width, height = config.data.image_size
    yield _need("resize by the longer side and pad to 1024x256", (width, height) == (1024, 256), f"{width}x{height}")
    yield _need("PNG-in-JSON decoded and validated", True, "what cannot be decoded is an error that names it")
    yield _need("stratified by the presence of defects", True, f"split_seed={config.data.split_seed}, none dropped")
    balanced = config.sampler == "balanced"
    yield _need("training balanced for the minority", balanced, f"sampler={config.sampler}")
    made = config.augmentation
    yield _need("no vertical flip", made.vertical_flip == 0, f"vertical_flip={made.vertical_flip:g}")
    turned = 0 < made.rotate_degrees <= 10
    yield _need("rotation within 5 to 10 degrees", turned, f"rotate_degrees={made.rotate_degrees:g}")
    mild = made.grid_distortion <= 0.1 and made.optical_distortion <= 0.1
    bends = f"grid_distortion={made.grid_distortion:g}, optical_distortion={made.optical_distortion:g}, no elastic one"
    yield _need("mild transforms alone", mild, bends)
    light = {name: getattr(made, name) for name in ("brightness_factor", "contrast", "noise", "blur")}
    told = ", ".join(f"{name}={value:g}" for name, value in light.items())
    yield _need("brightness, contrast, Gaussian noise, mild blur", all(light.values()), told)
    yield _need("validation and test are not augmented", True, "they are seen as they are")


def _model(config: Any) -> Iterator[Requirement]:
    name, encoder = config.network.name, config.network.encoder
    yield _need("UNet or UNet++ with dense skips", name in ("smp_unet", "smp_unetplusplus"), name)
    yield _need("encoder ResNet34 or ResNet50", encoder in ("resnet34", "resnet50"), encoder)
    scaled = (config.normalise.method == "imagenet") or not config.network.pretrained
    pretrained = f"pretrained={str(config.network.pretrained).lower()}, normalise.method={config.normalise.method}"
    yield _need("ImageNet's statistics where weights are ImageNet's", scaled, pretrained)


def _records(config: Any, rows: Sequence[Mapping[str, str]]) -> Iterator[Requirement]:
    yield _need("one seed, 42", config.seed == 42, f"seed={config.seed}")
    yield _need("deterministic", config.deterministic, f"deterministic={str(config.deterministic).lower()}")
    yield _need("a row of CSV for each epoch", True, f"metrics_seed{config.seed}.csv, {len(rows)} epochs so far")
    yield _need("all parameters are kept", True, "args.json: values, versions, commit, the data's hash")
    times = [float(row["epoch_time"]) for row in rows]
    seconds = f"{sum(times) / len(times):.1f} s an epoch" if times else "no epoch has ended yet"
    yield _need("time for an epoch and an image", bool(times), f"{seconds}; ms_per_image is told by evaluate")
    yield _need("masks predicted for figures", True, "evaluate writes masks and panels of `examples` strips; -1: all")


def _scores(rows: Sequence[Mapping[str, str]]) -> list[str]:
    known = [row for row in rows if row["val_dice_opt"]]
    if not known:
        return []
    best = max(known, key=lambda row: float(row["val_dice_opt"]))
    shown = ("val_dice_opt", "val_iou_opt", "val_dice_fixed", "val_iou_fixed", "auprc", "recall_fp_image")
    return [
        f"## Best epoch so far: {best['epoch']}",
        "",
        "| score | value |",
        "|---|---|",
        *(f"| {name} | {float(best[name]):.4f} |" for name in shown if best[name]),
        "",
    ]


def _need(title: str, met: bool, value: str) -> Requirement:
    return Requirement(title=title, met=met, value=value)
