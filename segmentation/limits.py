"""How much memory a file of data may take: some kilobytes can declare gigabytes.

A file that is large itself may take many times its size. What is refused is a small one that swells: no picture that
shows something does, though the mask of a large picture may.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from segmentation.epoch import DataError

Array = np.ndarray[Any, Any]

MIB = 2**20
LIMIT_MIB = 256
"""What any file may take while it is read."""
RATIO = 50
"""How many times its own size a file may take in any case."""
VARIABLE = "SEGMENTATION_MAX_MIB"
"""Environment variable that stands for another LIMIT_MIB."""


def allowed(path: Path) -> int:
    """Return how many bytes a file may take while it is read.

    Raises:
        DataError: if the environment variable is no whole number.
    """
    text = os.environ.get(VARIABLE, str(LIMIT_MIB))
    if not text.isdecimal():
        raise DataError(f"{VARIABLE}: got {text!r}; expected a whole number of MiB")
    state = path.stat()
    # What a sparse file only pretends to hold counts for nothing; some file systems do not tell.
    size = min(state.st_size, state.st_blocks * 512) if state.st_blocks else state.st_size
    return max(int(text) * MIB, RATIO * size)


def refuse_bomb(path: Path, size: int) -> None:
    """Raise DataError, naming the file and the remedy, if so many bytes are more than it may take."""
    if size > allowed(path):
        raise DataError(
            f"{path}: {path.stat().st_size / MIB:.2g} MiB that would take {size / MIB:,.0f} MiB to read; cut it into "
            f"parts, or set {VARIABLE}={-(-size // MIB)} if you know that it is no bomb"
        )


def read_npz(path: Path) -> dict[str, Array]:
    """Return the arrays of an .npz file by their names.

    Raises:
        DataError: naming the file, if it is missing, unreadable, swells, or holds more than plain arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise DataError(f"{path}: compressed otherwise than numpy does; write it by np.savez_compressed")
        refuse_bomb(path, 2 * sum(entry.file_size for entry in entries))
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    # What comes of a broken file differs from byte to byte.
    except Exception as error:
        problem = " ".join(str(error).replace(str(path), "").split())[:500] or type(error).__name__
        raise DataError(f"{path}: cannot be read as .npz ({problem}); write it again or remove it") from error
    if odd := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise DataError(f"{path}: {odd[0]} is no array; write it by np.savez")
    return arrays
