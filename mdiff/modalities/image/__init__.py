"""Images: codecs, captions, labels and inpainting."""

from __future__ import annotations

from mdiff.modalities.image.codec import CODES_KEY as CODES_KEY
from mdiff.modalities.image.codec import PUBLISHED_TENSORS as PUBLISHED_TENSORS
from mdiff.modalities.image.codec import SETTINGS as SETTINGS
from mdiff.modalities.image.codec import TENSORS as TENSORS
from mdiff.modalities.image.codec import Codec as Codec
from mdiff.modalities.image.codec import Report as Report
from mdiff.modalities.image.codec import holds_codec as holds_codec
from mdiff.modalities.image.codec import load_codec as load_codec
from mdiff.modalities.image.codec import make_codec as make_codec
from mdiff.modalities.image.codec import published_codec_of as published_codec_of
from mdiff.modalities.image.codec import published_codecs as published_codecs
from mdiff.modalities.image.codec import save_codec as save_codec
from mdiff.modalities.image.fidelity import fidelity as fidelity
from mdiff.modalities.image.inpainting import GREY as GREY
from mdiff.modalities.image.inpainting import Edits as Edits
from mdiff.modalities.image.inpainting import as_picture as as_picture
from mdiff.modalities.image.inpainting import box_mask as box_mask
from mdiff.modalities.image.inpainting import pasted as pasted
from mdiff.modalities.image.inpainting import pixel_mask as pixel_mask
from mdiff.modalities.image.modality import ImageModality as ImageModality
from mdiff.modalities.image.modality import image as image
from mdiff.modalities.image.modality import image_modality as image_modality
from mdiff.modalities.image.text_encoder import ARCHITECTURE as ARCHITECTURE
from mdiff.modalities.image.text_encoder import load_text_encoder as load_text_encoder
from mdiff.modalities.image.text_to_image import text_to_image as text_to_image
