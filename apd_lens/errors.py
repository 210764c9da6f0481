"""Every error and warning of apd_lens, to catch by name. All errors are subclasses of `ApdError`."""

from apd_lens._errors import AlreadyActive as AlreadyActive
from apd_lens._errors import ApdError as ApdError
from apd_lens._errors import ApdWarning as ApdWarning
from apd_lens._errors import ArtifactError as ArtifactError
from apd_lens._errors import InvalidBatches as InvalidBatches
from apd_lens._errors import InvalidOutput as InvalidOutput
from apd_lens._errors import InvalidSetting as InvalidSetting
from apd_lens._errors import MissingExtra as MissingExtra
from apd_lens._errors import NonFinite as NonFinite
from apd_lens._errors import ShapeMismatch as ShapeMismatch
from apd_lens._errors import SiteNotCalled as SiteNotCalled
from apd_lens._errors import UnknownWeight as UnknownWeight
from apd_lens._errors import UnsupportedModel as UnsupportedModel
from apd_lens._errors import WeightsChanged as WeightsChanged
