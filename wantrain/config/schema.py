"""The schema of a recipe: its sections. Each stands in `sections` with its rules.

Every field is followed by one sentence with its unit; `wantrain VERB --help` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wantrain.config.sections.adapter import Export, Lora
from wantrain.config.sections.data import Data
from wantrain.config.sections.model import ExpertOwn, Model
from wantrain.config.sections.objective import Loss, Sigma, Validation
from wantrain.config.sections.run import Run, Tracker
from wantrain.config.sections.sampling import Evaluate, Report, Sampler
from wantrain.config.sections.training import Memory, Optim, Train


@dataclass(slots=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    high: ExpertOwn = field(default_factory=ExpertOwn)
    low: ExpertOwn = field(default_factory=ExpertOwn)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    memory: Memory = field(default_factory=Memory)
    sigma: Sigma = field(default_factory=Sigma)
    loss: Loss = field(default_factory=Loss)
    validation: Validation = field(default_factory=Validation)
    sampler: Sampler = field(default_factory=Sampler)
    evaluate: Evaluate = field(default_factory=Evaluate)
    report: Report = field(default_factory=Report)
    export: Export = field(default_factory=Export)
    tracker: Tracker = field(default_factory=Tracker)

    def __post_init__(self) -> None:
        from wantrain.config.rules import refuse_faults  # it reads this module

        refuse_faults(self)
