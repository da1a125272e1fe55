"""One call in a process of its own: `python -m bmoe_utils.study.run.worker`, begun by :func:`bmoe_utils.study.run.engine.spread`.

The call is a line of JSON on standard input: ``function`` ("module:name"), ``call``, ``options``, and ``answer``, the file for
``{"result": ...}`` or ``{"error": text}``. Standard input then stays open; where it ends, because the caller stops or is gone,
the call is interrupted as by Ctrl-C and can shut down what it started.
"""
from __future__ import annotations

import _thread
import json
import os
import signal
import sys
import threading

from bmoe_utils.study.output import atomic_write
from bmoe_utils.study.run.engine import called


def speak_any_language():
    """What a terminal's encoding lacks is written as an escape, where Python would raise in the middle of a message."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):             # not what a notebook or a test puts there
            stream.reconfigure(errors="backslashreplace")


def _interrupt_at_the_end():
    while os.read(0, 4096):
        pass
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:                                              # Windows
        _thread.interrupt_main()


def main() -> int:
    speak_any_language()
    if not (line := sys.stdin.buffer.readline()):
        return 130                                     # stopped before it was told what to do
    job = json.loads(line)
    signal.signal(signal.SIGINT, signal.default_int_handler)         # a shell's background jobs inherit "ignore Ctrl-C"
    threading.Thread(target=_interrupt_at_the_end, daemon=True).start()
    try:
        said = {"result": called(job["function"], job["call"], job["options"])}
    except KeyboardInterrupt:
        return 130
    except Exception as error:                         # the caller's to judge
        said = {"error": f"{type(error).__name__}: {error}"}
    try:
        atomic_write(job["answer"], json.dumps(said))
    except OSError as error:                           # no room for temporary files
        print(f"error: {job['answer']}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
