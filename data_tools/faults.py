"""What a file raises that cannot be read or decoded, and what people are told of it."""

from __future__ import annotations

from pathlib import Path

import av

from data_tools.command import shown
from wantrain.terms import UserError

UNREADABLE = (UserError, av.FFmpegError, OSError, ValueError)
"""What a file that cannot be read or decoded raises."""


def fault_of(path: Path, error: Exception) -> str:
    """What people are told of one of UNREADABLE."""
    if isinstance(error, UserError):
        return error.message
    how = " cannot be decoded" if isinstance(error, av.FFmpegError) else ""
    return f"{shown(path)}{how}: {getattr(error, 'strerror', None) or error}"
