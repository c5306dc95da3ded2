"""Turns off transformers' progress bars for one call, and for nobody else.

transformers has one switch for the bars of the whole process. A call that turns it off and on again would do so for
other threads too. transformers also has a hook that makes the bars. Ours is put in once and stays. It asks whether the
thread that wants a bar is in a call without bars. Streams, logging and the switch are left alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_without_bars: ContextVar[bool] = ContextVar("headstart_without_progress_bars", default=False)
_lock = threading.Lock()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers makes no progress bars in this thread while it lasts."""
    _install()
    token = _without_bars.set(True)
    try:
        yield
    finally:
        _without_bars.reset(token)


def _install() -> None:
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    if not hasattr(logging, "set_tqdm_hook"):  # an earlier transformers, whose bars stay
        return
    with _lock:
        modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # it makes bars of its own, which no switch reaches
        if not hasattr(logging._tqdm_hook, "of_headstart"):  # ours, which somebody may have replaced meanwhile
            logging.set_tqdm_hook(_hook_over(logging._tqdm_hook, logging.EmptyTqdm))


def _hook_over(before, no_bar):
    def hook(factory, args, kwargs):
        if _without_bars.get():
            return no_bar(*args, **kwargs)
        return factory(*args, **kwargs) if before is None else before(factory, args, kwargs)

    hook.of_headstart = True
    return hook
