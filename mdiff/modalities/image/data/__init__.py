"""Image data sets: readers, examples and tokenised shards."""

from mdiff.modalities.image.data.examples import PictureRows as PictureRows
from mdiff.modalities.image.data.images import Pictures as Pictures
from mdiff.modalities.image.data.images import digest_of as digest_of
from mdiff.modalities.image.data.images import read_pictures as read_pictures
from mdiff.modalities.image.data.pixels import as_array as as_array
from mdiff.modalities.image.data.pixels import open_mask as open_mask
from mdiff.modalities.image.data.pixels import open_picture as open_picture
from mdiff.modalities.image.data.pixels import sized as sized
from mdiff.modalities.image.data.source import PictureSource as PictureSource
from mdiff.modalities.image.data.token_shards import FORMAT as FORMAT
from mdiff.modalities.image.data.token_shards import MANIFEST as MANIFEST
from mdiff.modalities.image.data.token_shards import TEXTS as TEXTS
from mdiff.modalities.image.data.token_shards import file_digest as file_digest
from mdiff.modalities.image.data.token_shards import fingerprint as fingerprint
from mdiff.modalities.image.data.token_shards import holds_shards as holds_shards
from mdiff.modalities.image.data.token_shards import open_shards as open_shards
from mdiff.modalities.image.data.token_shards import packed as packed
