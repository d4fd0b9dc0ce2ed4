"""How commands begin: without standard streams, in any locale, under nohup."""

import subprocess
import sys

import pytest

from tests.helpers.stages import ENVIRONMENT, ROOT, command, flags


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_hindrance(closed, corpus, tmp_path):
    words = command("prepare_data.py", "--data", corpus, "--out", tmp_path, "--num_workers", 1)
    shell = ["bash", "-c", f'"$@" {closed}', "bash", *words]
    process = subprocess.run(shell, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "valid.tsv").read_text().splitlines()[0] == str(corpus)


@pytest.mark.slow
def test_training_needs_no_standard_streams(manifests, teacher, tmp_path):
    words = command("distill.py", *flags(manifests, teacher, tmp_path / "exp", num_workers=1))
    shell = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *words]
    assert subprocess.run(shell, env=ENVIRONMENT, timeout=120).returncode == 0
    assert (tmp_path / "exp" / "ckpts" / "last.ckpt").exists()


def test_names_are_utf8_in_a_locale_that_is_not(corpus, tmp_path):
    words = command("prepare_data.py", "--data", corpus, "--out", tmp_path / "é", "--num_workers", 1)
    for locale in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}):
        process = subprocess.run(words, env=ENVIRONMENT | locale, capture_output=True, timeout=60)
        assert process.returncode == 0, process.stderr
        assert (tmp_path / "é" / "valid.tsv").exists()


def test_nohup_keeps_a_command_from_hearing_of_the_terminal():
    program = "from utils.processes import handle_signals as h; print([n.name for n in h(print)])"
    for handler, heeds in (("SIG_DFL", True), ("SIG_IGN", False)):
        words = [sys.executable, "-c", f"import signal; signal.signal(1, signal.{handler}); {program}"]
        said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
        assert ("SIGHUP" in said) == heeds and "SIGTERM" in said


def test_a_thread_that_fails_over_a_signals_end_says_nothing():
    program = """
import os, threading
from utils.processes import handle_signals, unwind
handle_signals(unwind)
ended = threading.Event()
thread = threading.Thread(target=lambda: ended.wait() / 0)
thread.start()
try:
    os.kill(os.getpid(), 15)
finally:
    ended.set()
    thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + 15 and "Traceback" not in done.stderr and "SIGTERM" in done.stderr
