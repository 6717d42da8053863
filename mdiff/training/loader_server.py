"""The module that the server of loader processes imports first; nothing else imports it.

A launcher sends SIGTERM to whole groups of processes, a terminal that closes SIGHUP. The trainer
then saves the current step, for which it needs its loaders, and these end with their server: so
the server ignores both. It ends with the trainer, by the pipe between them.
"""

import signal

# The imports of all loaders, once.
import mdiff.training.batches as batches

__all__ = ["batches"]

for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
