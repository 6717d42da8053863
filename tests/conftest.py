"""What has to come before every test module: Triton, imported for its interpreter."""

import interpreted  # noqa: F401
import processes

processes.watched()
