"""The config: what a recipe may say (schema, rules), and the way from a command line to it (loading)."""

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
from wantrain.config.rules import refuse_absent_clips as refuse_absent_clips
from wantrain.config.schema import BaseForm as BaseForm
from wantrain.config.schema import Config as Config
from wantrain.config.schema import DataMode as DataMode
from wantrain.config.schema import Dtype as Dtype
from wantrain.config.schema import ExpertOwn as ExpertOwn
from wantrain.config.schema import Experts as Experts
from wantrain.config.schema import Lora as Lora
from wantrain.config.schema import LoraFormat as LoraFormat
from wantrain.config.schema import OnNonfinite as OnNonfinite
from wantrain.config.schema import Optimizer as Optimizer
from wantrain.config.schema import Resume as Resume
from wantrain.config.schema import Weighting as Weighting
