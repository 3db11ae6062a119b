"""What a training costs in memory and time, by arithmetic: pure functions of plain values, without torch.

`wantrain plan` prints all of it; a training that runs out of memory gets `savers`.
"""

from wantrain.costs.adapter import Adapter as Adapter
from wantrain.costs.block import KEEPS as KEEPS
from wantrain.costs.choice import HOST_BYTES as HOST_BYTES
from wantrain.costs.choice import Candidate as Candidate
from wantrain.costs.choice import Choice as Choice
from wantrain.costs.choice import Fixed as Fixed
from wantrain.costs.choice import choose as choose
from wantrain.costs.choice import overrides as overrides
from wantrain.costs.choice import relieved as relieved
from wantrain.costs.devices import CARDS as CARDS
from wantrain.costs.devices import GIB as GIB
from wantrain.costs.devices import MEMORY_SHARE as MEMORY_SHARE
from wantrain.costs.devices import PCIE_SHARE as PCIE_SHARE
from wantrain.costs.devices import TYPICAL as TYPICAL
from wantrain.costs.devices import Card as Card
from wantrain.costs.devices import Family as Family
from wantrain.costs.devices import card_of as card_of
from wantrain.costs.memory import BY_ERROR as BY_ERROR
from wantrain.costs.memory import Job as Job
from wantrain.costs.memory import MemoryPolicy as MemoryPolicy
from wantrain.costs.memory import MicroBatch as MicroBatch
from wantrain.costs.memory import base_bytes as base_bytes
from wantrain.costs.memory import cache_bytes as cache_bytes
from wantrain.costs.memory import checkpoint_bytes as checkpoint_bytes
from wantrain.costs.memory import device_parts as device_parts
from wantrain.costs.memory import encoding_phases as encoding_phases
from wantrain.costs.memory import host_parts as host_parts
from wantrain.costs.memory import in_tensors as in_tensors
from wantrain.costs.memory import peak as peak
from wantrain.costs.memory import stays_mapped as stays_mapped
from wantrain.costs.savers import savers as savers
from wantrain.costs.seconds import Step as Step
from wantrain.costs.seconds import step as step
from wantrain.costs.tokens import largest_bucket as largest_bucket
from wantrain.costs.tokens import sequence_length as sequence_length
