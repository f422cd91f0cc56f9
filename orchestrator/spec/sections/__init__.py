"""The sections of an experiment file, one module each: documentation under each field, bounds in its type.

`section` holds the base class of all sections, `honored` the declaration of who acts on a field, `trial` the sections
that one trial has.
"""

from orchestrator.spec.sections.base import BaseSection
from orchestrator.spec.sections.data import (
    COLUMNS_OF,
    COMPRESSED,
    FILE_KINDS,
    GLOB,
    DataSection,
    HeldOut,
    Source,
    file_kind,
)
from orchestrator.spec.sections.evaluation import EvaluationSection, OwnMetric
from orchestrator.spec.sections.lora import LoraSection
from orchestrator.spec.sections.records import OutputSection, TrackingSection, WandbSection
from orchestrator.spec.sections.resources import ResourcesSection
from orchestrator.spec.sections.scheduler import SchedulerSection
from orchestrator.spec.sections.section import NAME_PATTERN, PositiveInt, RootSection, Section, Seed, require_floats
from orchestrator.spec.sections.training import TrainingSection
from orchestrator.spec.sections.trial import TrialConfig

__all__ = [
    "COLUMNS_OF",
    "COMPRESSED",
    "FILE_KINDS",
    "GLOB",
    "NAME_PATTERN",
    "BaseSection",
    "DataSection",
    "EvaluationSection",
    "HeldOut",
    "LoraSection",
    "OutputSection",
    "OwnMetric",
    "PositiveInt",
    "ResourcesSection",
    "RootSection",
    "SchedulerSection",
    "Section",
    "Seed",
    "Source",
    "TrackingSection",
    "TrainingSection",
    "TrialConfig",
    "WandbSection",
    "file_kind",
    "require_floats",
]
