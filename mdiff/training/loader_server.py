"""What the server of loader processes imports before it makes any; nothing else imports this.

A launcher tells whole groups of processes to end. The trainer then saves the step under way, for
which its loaders have to live: so the server, whose death would end them, leaves SIGTERM to the
trainer. It ends when the trainer does, by the pipe between them.
"""

from __future__ import annotations

import signal

# What loaders need, imported once for all of them.
import mdiff.training.step as stepping

__all__ = ["stepping"]

signal.signal(signal.SIGTERM, signal.SIG_IGN)
