#!/usr/bin/env python3
"""Owns the batch queue of a machine that has none: jobs as detached processes that hold a lock on their folder.

    batch.py submit --name NAME --walltime SECONDS [--warn SECONDS] JOB.SH   prints an id
    batch.py list RUNS                                                       one line per job, see list_jobs
    batch.py cancel RUNS --name NAME

A job holds an exclusive lock on `<its folder>/lock`, inherited by all it starts, until the last of them ends: the lock
says whether it lives, never a process id. Standard library only, Python 3.6 or newer.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

GRACE = 10.0


def folder_lock(folder, how=fcntl.LOCK_EX):
    """An open file on the folder's lock, or None if a job holds it."""
    file = open(os.path.join(folder, "lock"), "a")  # noqa: SIM115  given away, open
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except (IOError, OSError) as error:
        file.close()
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return None
        raise
    return file


def read_card(folder):
    """What is known of the job in a folder: {id, name, submitted, ends, group, state, reason, ended}, or None."""
    try:
        with open(os.path.join(folder, "job.card")) as file:
            return json.load(file)
    except (IOError, OSError, ValueError):
        return None


def write_card(folder, card):
    draft = os.path.join(folder, ".job.card.%d" % os.getpid())
    with open(draft, "w") as file:
        json.dump(card, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, os.path.join(folder, "job.card"))


def submit(options):
    """Start the job as a session of its own and print its id once its card is written."""
    folder = os.path.dirname(os.path.abspath(options.script))
    lock = folder_lock(folder)
    if lock is None:
        sys.stderr.write("batch.py: error: a job already holds %s\n" % folder)
        return 1
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        os.setsid()
        supervise(options, folder, lock, writer)
        os._exit(0)
    os.close(writer)
    lock.close()
    with os.fdopen(reader) as pipe:
        job_id = pipe.read().strip()
    os.wait()
    if not job_id:
        sys.stderr.write("batch.py: error: the job could not be started\n")
        return 1
    print(job_id)
    return 0


def supervise(options, folder, lock, writer):
    """The life of one job, from its first process to its last state."""
    os.set_inheritable(lock.fileno(), True)
    now = time.time()
    card = {
        "id": "%d.%d" % (int(now), os.getpid()),
        "name": options.name,
        "submitted": now,
        "ends": now + options.walltime,
        "group": os.getpid(),
        "state": "RUNNING",
        "reason": "",
    }
    write_card(folder, card)
    os.write(writer, card["id"].encode())
    os.close(writer)
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(os.path.join(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for target, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, target)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(
        ["bash", os.path.abspath(options.script)],
        cwd=folder,
        close_fds=False,
        preexec_fn=restore_signals,
        env=dict(os.environ, FLCTL_JOB_ID=card["id"]),
    )
    status = watch(child, card, folder, options.warn)
    if card["state"] == "RUNNING" and os.path.exists(os.path.join(folder, "cancelled")):
        card.update(state="CANCELLED", reason="cancelled by name")
    if card["state"] == "RUNNING":
        card.update(state="COMPLETED" if status == 0 else "FAILED", reason="exit status %d" % status)
    card["ended"] = time.time()
    write_card(folder, card)


def restore_signals():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def watch(child, card, folder, warn):
    """The job script's exit status. As Slurm does: USR1 to the script `warn` seconds before the walltime is over, TERM
    to all its processes when it is over or the job was cancelled, KILL after the grace."""
    warned, kill_at = warn <= 0, None
    while child.poll() is None:
        now = time.time()
        if not warned and now >= card["ends"] - warn:
            warned = True
            child.send_signal(signal.SIGUSR1)
        if kill_at is None and now >= card["ends"]:
            kill_at = now + GRACE
            card.update(state="TIMEOUT", reason="its walltime was over")
            os.killpg(card["group"], signal.SIGTERM)
        if kill_at is None and os.path.exists(os.path.join(folder, "cancelled")):
            kill_at = now + GRACE
            card.update(state="CANCELLED", reason="cancelled by name")
        if kill_at is not None and now >= kill_at:
            card["ended"] = now
            write_card(folder, card)
            os.killpg(card["group"], signal.SIGKILL)
        time.sleep(0.05)
    return child.returncode


def jobs_below(runs):
    """(folder, card, alive) of every job below a folder of runs."""
    if not os.path.isdir(runs):
        return
    for name in sorted(os.listdir(runs)):
        folder = os.path.join(runs, name)
        card = read_card(folder)
        if card is not None:
            lock = folder_lock(folder, fcntl.LOCK_SH)  # others who look are no jobs
            if lock is not None:
                lock.close()
                card = read_card(folder)
            yield folder, card, lock is None


def list_jobs(options):
    """id|STATE|submitted|started|ends|elapsed|reason|name of each job; empty where nobody wrote down when it ended."""
    for _, card, alive in jobs_below(options.runs):
        state = card["state"]
        if not alive and state == "RUNNING":
            state = "LOST"
        ended = card.get("ended", time.time() if state == "RUNNING" else None)
        print(
            "|".join(
                [
                    card["id"],
                    state,
                    "%d" % card["submitted"],
                    "%d" % card["submitted"],
                    "%d" % card["ends"],
                    "" if ended is None else "%.1f" % (ended - card["submitted"]),
                    card["reason"],
                    card["name"],
                ]
            )
        )
    return 0


def cancel(options):
    """TERM to every process of the jobs of that name. While the lock is held one of them lives, so the number of
    their process group cannot have been given to anybody else."""
    for folder, card, alive in jobs_below(options.runs):
        if alive and card["name"] == options.name:
            open(os.path.join(folder, "cancelled"), "w").close()
            with contextlib.suppress(ProcessLookupError):  # what holds the lock has left the group (a daemon)
                os.killpg(card["group"], signal.SIGTERM)
    return 0


def main():
    parser = argparse.ArgumentParser(prog="batch.py")
    commands = parser.add_subparsers(dest="command")
    sub = commands.add_parser("submit")
    sub.set_defaults(action=submit)
    sub.add_argument("--name", required=True)
    sub.add_argument("--walltime", type=float, required=True)
    sub.add_argument("--warn", type=float, default=0.0)
    sub.add_argument("script")
    sub = commands.add_parser("list")
    sub.set_defaults(action=list_jobs)
    sub.add_argument("runs")
    sub = commands.add_parser("cancel")
    sub.set_defaults(action=cancel)
    sub.add_argument("runs")
    sub.add_argument("--name", required=True)
    options = parser.parse_args()
    if not options.command:
        parser.error("submit, list or cancel?")
    os.umask(0o077)
    return options.action(options)


if __name__ == "__main__":
    sys.exit(main())
