"""Train a network on satellite tiles by PyTorch Lightning, told by the ESD project's flags.

models/MODEL_TYPE/last.ckpt and best.ckpt are what it leaves; what was there before is renamed, not written over. With
--wandb_run_name it is followed by Weights & Biases as WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE (offline) say.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

# As `python scripts/train.py` the search path begins in this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configuration
from segmentation import training
from segmentation.epoch import NonFiniteError
from workloads import esd
from workloads._esd import original
from workloads._esd.original import ESDConfig
from workloads.esd import Config

logger = logging.getLogger("scripts.train")
LAST = "last.ckpt"


def main(flags: list[str] | None = None) -> int:
    """Train, and return the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        told = original.parse(ESDConfig, sys.argv[1:] if flags is None else flags, "scripts.train")
        config = configuration.build(Config, {**original.values(told), "trainer": "lightning"})
        for warning in esd.prepare(config)["warnings"]:
            logger.warning("%s", warning)
        fit(config, told)
    except (ValueError, OSError) as error:
        print(f"scripts.train: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"scripts.train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(told.models / LAST)
    return 0


def fit(config: Config, told: ESDConfig) -> None:
    """Fit by a plain Trainer."""
    from workloads._esd.lightning import TileDataModule, TileModule, quiet, trainer, wandb_logger

    _put_aside(told.models)
    log = None
    if told.wandb_run_name is not None:
        log = wandb_logger(
            told.models,
            project=os.environ.get("WANDB_PROJECT", "esd"),
            entity=os.environ.get("WANDB_ENTITY"),
            mode=os.environ.get("WANDB_MODE", "offline"),
            name=told.wandb_run_name,
        )
    with training.settings(config), quiet():
        trainer(config, told.models, logger=log).fit(TileModule(config), TileDataModule(config))


def _put_aside(folder: Path) -> None:
    """Rename the checkpoints that a folder holds: the project's script wrote over them, here nothing is lost."""
    if not (folder / LAST).exists():
        return
    number = 1
    while (other := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(other)
    logger.info("%s: what was there is now in %s", folder, other)


if __name__ == "__main__":
    sys.exit(main())
