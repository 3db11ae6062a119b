"""Which media each task works with besides the clip and its caption: one table. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from wantrain.models.variants import Task
from wantrain.terms import WINDOW


@dataclass(frozen=True, slots=True)
class TaskMedia:
    """The media that a task works with besides the clip and its caption. Names are those of Frames and PARTNERS.

    A clip must have one of each group of `partners_needed`; `partners` are all that it may have. A sample cannot do
    without `inputs_needed`; `inputs` are all that it may be given. `encoded` is what the condition of a window is made
    of, where WINDOW stands for the window's own frames. `together` are pairs of which the first says nothing without
    the second.
    """

    partners_needed: tuple[tuple[str, ...], ...] = ()
    partners: tuple[str, ...] = ()
    inputs_needed: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    encoded: tuple[str, ...] = ()
    together: tuple[tuple[str, str], ...] = ()

    def lacking(self, given: Collection[str]) -> tuple[str, str] | None:
        """The first of `together` of which the first is given alone; None where there is none."""
        return next((pair for pair in self.together if pair[0] in given and pair[1] not in given), None)


_POSE = ("control", "face", "reference")
_REPLACED = (*_POSE, "control_mask", "background")
_DRIVEN = ("control", "reference")
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
    "animate": TaskMedia(tuple((name,) for name in _POSE), _REPLACED, _POSE, _REPLACED, _REPLACED,
                         (("background", "control_mask"), ("control_mask", "background"))),
    "animate2": TaskMedia((("control",), ("reference",)), _DRIVEN, _DRIVEN, _DRIVEN, _DRIVEN),
    "s2v": TaskMedia((), _SPEECH, ("audio", "reference"), _SPEECH, (WINDOW, *_SPEECH)),
    "vace": TaskMedia((("control", "reference"),), _VACE, (), _VACE, _VACE,
                      (("control_mask", "control"),)),
}


def media_of_task(task: Task) -> TaskMedia:
    """The media that a task works with."""
    return _TASKS.get(task, TaskMedia())
