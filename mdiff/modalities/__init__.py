"""Media to tokens and back: the contract of a modality and its capabilities."""

from mdiff.modalities.protocol import Conditional as Conditional
from mdiff.modalities.protocol import Describes as Describes
from mdiff.modalities.protocol import Description as Description
from mdiff.modalities.protocol import Editable as Editable
from mdiff.modalities.protocol import EndsText as EndsText
from mdiff.modalities.protocol import HasDocuments as HasDocuments
from mdiff.modalities.protocol import HasFolders as HasFolders
from mdiff.modalities.protocol import HasGrid as HasGrid
from mdiff.modalities.protocol import HasLayout as HasLayout
from mdiff.modalities.protocol import HasParts as HasParts
from mdiff.modalities.protocol import HasSpecialTokens as HasSpecialTokens
from mdiff.modalities.protocol import Modality as Modality
from mdiff.modalities.protocol import ShowsImages as ShowsImages
from mdiff.modalities.protocol import TextConditional as TextConditional
