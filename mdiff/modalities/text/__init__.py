"""Text: tokenizers, documents and how rows are packed."""

from mdiff.modalities.text.documents import Piece as Piece
from mdiff.modalities.text.documents import Source as Source
from mdiff.modalities.text.documents import cut_documents as cut_documents
from mdiff.modalities.text.documents import json_lines as json_lines
from mdiff.modalities.text.documents import read_bytes as read_bytes
from mdiff.modalities.text.documents import read_text as read_text
from mdiff.modalities.text.modality import Text as Text
from mdiff.modalities.text.modality import text as text
from mdiff.modalities.text.pretrained import Pretrained as Pretrained
from mdiff.modalities.text.typed import HOLE as HOLE
from mdiff.modalities.text.typed import fitting as fitting
