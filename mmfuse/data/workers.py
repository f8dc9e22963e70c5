"""Worker processes and the signals that a scheduler sends to all processes of a job."""

from __future__ import annotations

import os
import signal
import sys
import threading


def shield_worker(worker_id: int) -> None:
    """Let a DataLoader worker outlive the signals that its trainer is to answer; for `worker_init_fn`.

    A signal to the whole job reaches workers, too, and a worker that dies makes the trainer fail before it has saved.
    Only SIGTERM of the trainer itself, which is how torch ends its workers, ends this one.
    """
    if sys.platform == "win32":
        return
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_parent, args=(os.getppid(),), daemon=True, name="signals").start()


def _await_parent(parent: int) -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            os._exit(0)
