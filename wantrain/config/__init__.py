"""The config: what a recipe may say (schema, sections, rules), and the way from a command line to it (loading)."""

from wantrain.config.keys import HARMLESS_TO_RESUME as HARMLESS_TO_RESUME
from wantrain.config.keys import defaults as defaults
from wantrain.config.keys import described as described
from wantrain.config.keys import digest as digest
from wantrain.config.keys import expert_config as expert_config
from wantrain.config.keys import flat as flat
from wantrain.config.keys import resume_keys as resume_keys
from wantrain.config.keys import to_yaml as to_yaml
from wantrain.config.known import asset as asset
from wantrain.config.known import recipes as recipes
from wantrain.config.loading import load as load
from wantrain.config.loading import tell_untriggered as tell_untriggered
from wantrain.config.places import configs_folder as configs_folder
from wantrain.config.schema import Config as Config
from wantrain.config.sections.adapter import Lora as Lora
from wantrain.config.sections.adapter import LoraFormat as LoraFormat
from wantrain.config.sections.data import DataMode as DataMode
from wantrain.config.sections.data import refuse_absent_clips as refuse_absent_clips
from wantrain.config.sections.model import Dtype as Dtype
from wantrain.config.sections.model import ExpertOwn as ExpertOwn
from wantrain.config.sections.model import Experts as Experts
from wantrain.config.sections.objective import Weighting as Weighting
from wantrain.config.sections.training import BaseForm as BaseForm
from wantrain.config.sections.training import OnNonfinite as OnNonfinite
from wantrain.config.sections.training import Optimizer as Optimizer
from wantrain.config.sections.training import Resume as Resume
