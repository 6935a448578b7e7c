"""Ends a server or executor process at a chosen line, or counts the lines it crosses.

Python imports a module of this name at every start, so whoever puts this directory on PYTHONPATH can crash a process of
the product at any line without a word about it in the product. What to do stands in the environment:

CRASH_PLANS: JSON list of {role, file, line, crossing, signal, marker}: the process of this role gets the signal when
    any of its threads comes to this line for the crossing-th time. `marker` is the file that then says so; a plan whose
    file exists has been carried out, by this process or by an earlier one.
CRASH_COUNTS: a directory. Each process that ends by itself writes how often it crossed each line of CRASH_FILES (JSON
    list of file names that end in these).
"""

import atexit
import inspect
import json
import os
import signal
import sys
import threading


def _role() -> str | None:
    if "tinkerbell.executors.worker" in sys.orig_argv:
        return "executor"
    return "server" if "serve" in sys.orig_argv else None


def _lines(code):
    return {line for _, _, line in code.co_lines() if line is not None}


class _Crash:
    """One plan that was not carried out yet."""

    def __init__(self, plan):
        self._file, self._line, self._marker = plan["file"], plan["line"], plan["marker"]
        self._left = plan["crossing"]
        self._signal = signal.Signals[plan["signal"]]
        self._lock = threading.Lock()

    def concerns(self, code):
        return code.co_filename.endswith(self._file) and self._line in _lines(code)

    def cross(self, frame):
        if frame.f_lineno != self._line:
            return
        with self._lock:
            self._left -= 1
            due = self._left == 0
        if due:
            # By this name others wait for it: it has to be whole when it is there.
            with open(f"{self._marker}.new", "w") as file:
                json.dump({"pid": os.getpid(), "thread": threading.current_thread().name}, file)
            os.rename(f"{self._marker}.new", self._marker)
            os.kill(os.getpid(), self._signal)


class _Counter:
    """How often each line was crossed."""

    def __init__(self, role, directory, files):
        self._files = tuple(files)
        self._found = {}
        atexit.register(self._write, os.path.join(directory, f"{role}-{os.getpid()}.json"))

    def concerns(self, code):
        # Only functions: a module or a class runs once, when it is imported.
        return code.co_filename.endswith(self._files) and bool(code.co_flags & inspect.CO_OPTIMIZED)

    def cross(self, frame):
        key = (frame.f_code.co_filename, frame.f_lineno)
        self._found[key] = self._found.get(key, 0) + 1

    def _write(self, path):
        sys.settrace(None)
        with open(path, "w") as file:
            json.dump([[name, line, count] for (name, line), count in list(self._found.items())], file)


def _install(watchers):
    known = {}

    def enter(frame, _event, _arg):
        code = frame.f_code
        concerned = known.get(code)
        if concerned is None:
            concerned = known[code] = [watcher for watcher in watchers if watcher.concerns(code)]
        if not concerned:
            return None

        def step(frame, event, _arg):
            if event == "line":
                for watcher in concerned:
                    watcher.cross(frame)
            return step

        return step

    threading.settrace(enter)
    sys.settrace(enter)


def _main():
    role = _role()
    if role is None:
        return
    plans = json.loads(os.environ.get("CRASH_PLANS", "[]"))
    watchers = [_Crash(plan) for plan in plans if plan["role"] == role and not os.path.exists(plan["marker"])]
    if "CRASH_COUNTS" in os.environ:
        watchers.append(_Counter(role, os.environ["CRASH_COUNTS"], json.loads(os.environ["CRASH_FILES"])))
    if watchers:
        _install(watchers)


_main()
