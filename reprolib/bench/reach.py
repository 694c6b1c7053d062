"""Which networks can be timed."""

from __future__ import annotations

from reprolib.experiments.profiles import Profile
from reprolib.training import data


def why_untimed(profile: Profile) -> str:
    """Why the networks of a profile are not timed, as a text; empty where they are."""
    if profile.model != "vgg16":
        return f"only VGG-16 is timed, not {profile.model}"
    for dataset in profile.datasets:
        if (size := data.shape(dataset)[1]) != 32:
            return f"only VGG-16 for images of 32 x 32 pixels is timed, and those of {dataset} have {size} x {size}"
    return ""
