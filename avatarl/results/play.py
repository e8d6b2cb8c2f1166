"""The playground: a page that is served on this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from avatarl.errors import UserError
from avatarl.objective.config import require_whole

if TYPE_CHECKING:
    import gradio

LARGEST_PORT = 65535


def play(
    runs: Sequence[str],
    *,
    critic: Sequence[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    device: str = "auto",
) -> None:
    """Serve a page where players continue a prompt and each token shows its rewards, until an interrupt.

    Args:
        runs: One or two run folders, model folders or hub ids.
        critic: Critics (default: those that the first run was trained with, as far as they are there).
        host: Address to listen on. There is no password: anybody who reaches it may use the page.
        port: Port there.
        device: cpu, cuda or auto.

    Raises:
        UserError: gradio is not installed, the port cannot be had, or a model cannot be opened.
    """
    check_port(host, port)
    app = build_app(runs, critic, device)
    from .app import launch

    launch(app, host, port)
    print(f"{app.local_url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        app.close(verbose=False)


def build_app(runs: Sequence[str], critics: Sequence[str] | None = None, device: str = "auto") -> gradio.Blocks:
    """The page of :func:`play`, not yet served.

    Raises:
        UserError: gradio is not installed, or a model cannot be opened.
    """
    try:
        from .app import build
    except ImportError as error:
        raise UserError(f"play needs gradio, which is not installed ({error}); pip install 'avatarl[app]'") from None
    return build(runs, critics, device)


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before models are opened for it.

    Raises:
        UserError: naming it.
    """
    require_whole("port", port, minimum=1)
    if port > LARGEST_PORT:
        raise UserError(f"port is {port}; expected at most {LARGEST_PORT}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"port {port} of {host} cannot be listened on ({error}); give a free one with --port, or another --host"
        ) from error
