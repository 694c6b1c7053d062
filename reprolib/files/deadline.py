"""Deadlines: how long something may take, and what is raised when that is over."""

import argparse
import re


class OutOfTime(Exception):
    """Work stopped at its deadline. What is done is kept: asking again goes on from there."""


def seconds(text: str) -> float:
    """Seconds of a time such as 90s, 20m or 1h30m. Raises argparse.ArgumentTypeError."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not (text and parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: write 90s, 20m or 1h30m")
    return sum(int(number or 0) * unit_s for number, unit_s in zip(parts.groups(), (3600, 60, 1), strict=True))
