"""The app as a server on 127.0.0.1, for the demo: ``python -m examples.bank.server [--stock]``.

The server uses the database of ``DATABASE_URL``, prints the port that it listens on, and ends when
its standard input ends. The demo holds the other end of this input, so no server outlives the demo,
however the demo ends.
"""

from __future__ import annotations

import os
import sys
import threading

from werkzeug.serving import WSGIRequestHandler, make_server


class QuietHandler(WSGIRequestHandler):
    """Answers requests without a line in the log for each."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def main(arguments: list[str]) -> None:
    """Serve until standard input ends.

    :param arguments: ``--stock`` for the app on stock Flask-SQLAlchemy, and ``--port`` with a
        number for this port in place of a free one.
    """
    threading.Thread(target=end_with_input, daemon=True).start()
    if "--stock" in arguments:
        from .stock import use_stock

        use_stock()
    from .app import create_app
    from .models import create_tables

    app = create_app()
    with app.app_context():
        create_tables()
    port = int(arguments[arguments.index("--port") + 1]) if "--port" in arguments else 0
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=QuietHandler)
    print(server.port, flush=True)
    server.serve_forever()


def end_with_input() -> None:
    """End the process when standard input ends, without waiting for requests."""
    while os.read(0, 1024):  # not sys.stdin, whose lock would block the exit
        pass
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
