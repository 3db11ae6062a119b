"""Without what Windows lacks, every module is imported, and the verbs that look at a machine and a recipe answer.

It hides modules, functions and signals; `os.name` stays as it is, for the libraries of this machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses")
OF_OS = ("fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid", "killpg", "setsid", "getloadavg",
         "sched_getaffinity", "sched_setaffinity", "statvfs", "sysconf", "mkfifo", "openpty", "chown", "nice", "pread",
         "pwrite", "posix_fadvise", "sync")
"""But not uname, register_at_fork and, below, SIGKILL: numpy, torch and multiprocessing use them on this system."""
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGCONT",
           "SIGTSTP", "SIGBUS", "alarm", "setitimer", "pthread_sigmask", "siginterrupt", "pause")
HIDE = f"""
import os, signal, sys
from multiprocessing import reduction
for name in {MODULES}:
    sys.modules[name] = None
for module, names in ((os, {OF_OS}), (signal, {SIGNALS})):
    for name in names:
        delattr(module, name)
reduction.HAVE_SEND_HANDLE = False  # then multiprocessing offers no forkserver
"""
IMPORT_ALL = """
import importlib, pkgutil, sys
import data_tools, wantrain
found = [one.name for room in (wantrain, data_tools)
         for one in pkgutil.walk_packages(room.__path__, room.__name__ + ".") if one.name != "wantrain.__main__"]
assert len(found) > 150
for name in found:
    importlib.import_module(name)
"""
AGAIN = """
for name in [name for name in sys.modules if name.partition(".")[0] in ("wantrain", "data_tools")]:
    del sys.modules[name]
"""
CALL = """
from wantrain import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def printed(program, *arguments, cwd=None):
    """stdout of a program."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=cwd, text=True, capture_output=True,
                          check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_hidden_is_there_to_be_hidden():
    for name in OF_OS:
        assert hasattr(os, name)
    for name in SIGNALS:
        assert hasattr(signal, name)


@pytest.mark.slow
def test_every_module_is_imported():
    """Twice, so that the libraries, which know their system by other signs, are there before anything is hidden."""
    printed(IMPORT_ALL + AGAIN + HIDE + IMPORT_ALL)


def test_help_and_check_answer(arguments, tmp_path):
    assert "wantrain VERB" in printed(HIDE + CALL, "--help")
    assert "next: wantrain" in printed(HIDE + CALL, "check", *arguments, cwd=tmp_path)


@pytest.mark.slow
def test_doctor_answers(tmp_path):
    assert "packages" in printed(HIDE + CALL, "doctor", cwd=tmp_path)
