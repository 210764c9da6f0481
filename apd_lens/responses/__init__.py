"""What components respond to, and what they do."""

from apd_lens.responses._responses import CoActivation as CoActivation
from apd_lens.responses._responses import Effects as Effects
from apd_lens.responses._responses import Responses as Responses
from apd_lens.responses._responses import TopExamples as TopExamples
