"""Which media each task works with besides the clip and its caption: one table. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from wantrain.models.variants import Task
from wantrain.terms import WINDOW


@dataclass(frozen=True, slots=True)
class TaskMedia:
    """The media that a task works with besides the clip and its caption. Names are those of Frames and PARTNERS.

    A clip must have one of each group of `partners_needed`; `partners` are all that it may have. A sample cannot do
    without `inputs_needed`; `inputs` are all that it may be given. `encoded` is what the condition of a window is made
    of, where WINDOW stands for the window's own frames.
    """

    partners_needed: tuple[tuple[str, ...], ...] = ()
    partners: tuple[str, ...] = ()
    inputs_needed: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()


_POSE = ("control", "face", "reference")
_SPEECH = ("audio", "reference", "control")
_VACE = ("control", "control_mask", "reference")
_CONTROL = TaskMedia((("control",),), ("control", "reference"), ("control",), ("control", "reference", "first"),
                     (WINDOW, "control", "reference"))
_CAMERA = TaskMedia((("camera",),), ("camera",), ("camera", "first"), ("camera", "first"), (WINDOW, "camera"))
_TASKS: dict[Task, TaskMedia] = {
    "i2v": TaskMedia(inputs_needed=("first",), inputs=("first",), encoded=(WINDOW,)),
    "flf2v": TaskMedia(inputs_needed=("first", "last"), inputs=("first", "last"), encoded=(WINDOW,)),
    "ti2v": TaskMedia(inputs=("first",)),
    "control": TaskMedia((("control",),), ("control",), ("control",), ("control", "first"), (WINDOW, "control")),
    "control_reference": _CONTROL, "control_inpaint": _CONTROL, "camera": _CAMERA, "camera_inpaint": _CAMERA,
    "animate": TaskMedia(tuple((name,) for name in _POSE), _POSE, _POSE, _POSE, _POSE),
    "s2v": TaskMedia((), _SPEECH, ("audio", "reference"), _SPEECH, (WINDOW, *_SPEECH)),
    "vace": TaskMedia((("control", "reference"),), _VACE, (), _VACE, _VACE),
}


def media_of_task(task: Task) -> TaskMedia:
    """The media that a task works with."""
    return _TASKS.get(task, TaskMedia())
