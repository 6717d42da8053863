"""The helpers of the tests beside this folder are found from here too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "support"))
