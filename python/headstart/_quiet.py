"""Turns off transformers' progress bars and reports for one call, and for nobody else.

transformers has one switch for the bars of the whole process. A call that turns it off and on again would do so for
other threads too. transformers also has a hook that makes the bars. headstart installs its own hook once, and the hook
stays. The hook checks whether the thread that wants a bar is in a call without bars. Streams, logging and the switch
are not changed.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_without_bars: ContextVar[bool] = ContextVar("headstart_without_progress_bars", default=False)
_without_reports: ContextVar[bool] = ContextVar("headstart_without_reports", default=False)
_lock = threading.Lock()
# from_pretrained replaces things that belong to the whole process, PreTrainedModel.tie_weights and torch's default
# dtype, and afterwards puts back what it found. If two threads do this at once, the replacement can stay. Then the
# output layer of every later model has random numbers, where it should share the embedding's weights.
_one_load = threading.RLock()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within this context, transformers makes no progress bars in this thread."""
    _install()
    token = _without_bars.set(True)
    try:
        yield
    finally:
        _without_bars.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Like `no_progress_bars`, and only one load runs at a time.

    transformers also does not report which weights it loaded, because `load` checks them itself.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_wanted)  # a second call does nothing; the logger's level belongs to all threads
    with _one_load, no_progress_bars():
        token = _without_reports.set(True)
        try:
            yield
        finally:
            _without_reports.reset(token)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not _without_reports.get()


def _install() -> None:
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as messages

    if not hasattr(messages, "set_tqdm_hook"):  # an earlier version of transformers; its bars stay
        return
    with _lock:
        modeling_gguf_pytorch_utils.tqdm = messages.tqdm  # it makes its own bars, which no switch turns off
        if not hasattr(messages._tqdm_hook, "of_headstart"):  # other code may have replaced our hook
            messages.set_tqdm_hook(_hook_over(messages._tqdm_hook, messages.EmptyTqdm))


def _hook_over(before, no_bar):
    def hook(factory, args, kwargs):
        if _without_bars.get():
            return no_bar(*args, **kwargs)
        return factory(*args, **kwargs) if before is None else before(factory, args, kwargs)

    hook.of_headstart = True
    return hook
