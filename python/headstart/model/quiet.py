"""Loads without transformers' progress bars and reports, and leaves the process as it was."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_quiet: ContextVar[bool] = ContextVar("headstart_quiet", default=False)
# transformers has one switch for the whole process: the first thread that comes turns it off, the last one that leaves
# puts it back.
_lock = threading.Lock()
_inside, _bars_before = 0, False


@contextmanager
def quiet() -> Iterator[None]:
    """In its block, and in this thread, transformers does not report which weights it loaded. `load` checks these.

    Neither sys.stderr nor the level of a logger is touched: they belong to all threads.
    """
    from transformers.utils import logging as messages

    global _inside, _bars_before
    with _lock:
        if not _inside:
            _bars_before = messages.is_progress_bar_enabled()
            messages.disable_progress_bar()
        _inside += 1
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_wanted)  # does nothing the second time
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)
        with _lock:
            _inside -= 1
            if not _inside and _bars_before:
                messages.enable_progress_bar()


def _is_wanted(record: logging.LogRecord) -> bool:
    return not _quiet.get()
