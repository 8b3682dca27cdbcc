"""The cast to a narrow format by ml_dtypes. Not in `oracle`, which has to do without that package."""

import ml_dtypes
import numpy as np

from .oracle import ML_DTYPES_FORMATS


def ml_dtypes_cast(w: np.ndarray, name: str) -> np.ndarray:
    """The cast of ml_dtypes, saturating; NaN for what is not finite."""
    largest = np.float32(ML_DTYPES_FORMATS[name].max)
    with np.errstate(invalid="ignore"):
        cast = np.clip(w, -largest, largest).astype(getattr(ml_dtypes, name)).astype(np.float32)
    if name.endswith("fnuz"):  # these have no -0
        cast = np.copysign(cast, w)
    return np.where(np.isfinite(w), cast, np.float32(np.nan))
