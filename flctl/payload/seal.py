#!/usr/bin/env python3
"""Owns the truth about one attempt at a site: who may train (owner) and how it ended (done.json).

    seal.py start   first line of a job: take `owner`, pin the base, print the job's environment
    seal.py finish  last line of a job: hash what it made, write done.json
    seal.py revoke  from the login host: take `owner` away from jobs that have not started
    seal.py frozen  from the login host: is the frozen base of adapters there, as told on stdin

Standard library only, Python 3.6 or newer: it runs with whatever python3 a facility has.
Exit status: 0; 75 this copy may not train or seal (another owner, or revoked); 76 the base is not what was ordered.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time

SCHEMA = 1
NOT_OWNER = 75
WRONG_BASE = 76
CHUNK = 1 << 20
SAME_TASK = (
    *("campaign_id", "site", "number", "work", "base", "steps", "global_step", "total_steps", "seed", "train"),
    "continues",
)
METRICS_MOST = 1 << 18
ERROR = re.compile(
    r"(?:\d{1,6}: |\[[\w,.]{1,40}\](?:<\w{1,8}>)?: ?)?((?:train\.py|flctl): error(?: \[([a-z]{1,20})\])?: (.*))"
)
RESERVE = "reserve"
RESERVED = 2 * METRICS_MOST
NAMESPACE = "flctl-manifest"
SIGNING_MOST = 60


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def files_below(folder):
    """[{path, size, sha256}] of the regular files below a folder; links and special files are left out."""
    entries = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(place, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            relative = os.path.relpath(path, folder).replace(os.sep, "/")
            entries.append({"path": relative, "size": os.path.getsize(path), "sha256": sha256_of(path)})
    return entries


def folder_sha256(folder):
    """sha256 of the sorted lines `<sha256>  <relative path>`, flctl.json left out."""
    lines = sorted("%s  %s\n" % (e["sha256"], e["path"]) for e in files_below(folder) if e["path"] != "flctl.json")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_json(path, data, key=""):
    """By temporary name, fsync and rename: a reader sees the whole record or none, and its signature before it. With a
    `key` the record says under `signed` whether it is, or why not."""
    draft = "%s.%d" % (path, os.getpid())
    write_draft(draft, dict(data, signed=True) if key else data)
    problem = key and sign(draft, key)
    if problem:
        write_draft(draft, dict(data, signed=problem))
    elif key:
        os.rename(draft + ".sig", path + ".sig")
    os.rename(draft, path)
    folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_draft(draft, data):
    try:
        with open(draft, "w") as file:
            json.dump(data, file, indent=1, sort_keys=True)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        remove(draft)
        raise


def remove(path):
    with contextlib.suppress(OSError):
        os.unlink(path)


def reserve(run):
    """Take the room that the record of the end will need: a job that fills disk or quota must still be able to say so.
    Not zeros, which some file systems do not store."""
    path = os.path.join(run, RESERVE)
    try:
        with open(path, "wb") as file:
            file.write(os.urandom(RESERVED))
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        remove(path)
        raise


def is_full(run):
    """Whether nothing can be written any more, for want of room."""
    path = os.path.join(run, RESERVE + ".more")
    try:
        with open(path, "wb") as file:
            file.write(os.urandom(CHUNK // 4))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    finally:
        remove(path)
    return False


def sign(path, key):
    """Sign a file with OpenSSH 8.1 or newer, into <path>.sig; why that cannot be done, or an empty string."""
    words = ["ssh-keygen", "-Y", "sign", "-n", NAMESPACE, "-f", key, path]
    environment = dict(os.environ, SSH_ASKPASS_REQUIRE="never", LC_ALL="C")
    environment.pop("SSH_AUTH_SOCK", None)
    environment.pop("DISPLAY", None)
    try:
        # A session of its own has no terminal on which a passphrase could be asked for.
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            said = child.communicate(timeout=SIGNING_MOST)[1].decode("utf-8", "replace")
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            return "not signed: ssh-keygen did not end in time"
    except OSError as error:
        return "not signed: ssh-keygen cannot be run: %s" % error.strerror
    if child.returncode == 0 and os.path.exists(path + ".sig"):
        with open(path + ".sig") as file:
            os.fsync(file.fileno())
        return ""
    if "unknown option" in said or "illegal option" in said or "usage:" in said:
        return "not signed: ssh-keygen is older than OpenSSH 8.1"
    return "not signed: " + "".join(c if c.isprintable() else " " for c in said).strip()[-200:]


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def take_owner(run, claim):
    """Become the owner of the attempt, or learn who is: link(2) from a file that already holds the claim is atomic on
    every shared file system. A retransmitted link over NFS may report EEXIST for our own success: the nonce tells."""
    owner, draft = os.path.join(run, "owner"), os.path.join(run, ".owner.%s" % claim["nonce"])
    if os.path.exists(owner):  # who it is can be told where nothing can be written any more
        return read_json(owner) or {}
    write_json(draft, claim)
    try:
        os.link(draft, owner)
    except OSError:
        if not os.path.exists(owner):
            raise
    finally:
        remove(draft)  # may be gone: a second revocation beside this one, or an unlink that NFS sent twice
    return read_json(owner) or {}


def newest_model(workdir):
    versions = [n for n in os.listdir(os.path.join(workdir, "models")) if re.match(r"^\d+$", n)]
    if not versions:
        raise SystemExit("seal.py: error: there is no model below %s" % workdir)
    return max(versions, key=int)


def resolve_base(order, workdir):
    """(folder name, sha256 or None) of the base the order asks for, as of now."""
    base = order["base"]
    if base["version"] == "newest":
        return newest_model(workdir), None
    return "%04d" % base["version"], base.get("sha256")


def margin_of(order, walltime, size):
    """Seconds before the walltime by which out/ must be complete: saving and hashing at 50 MB/s and a constant."""
    asked = order.get("margin", 30 + 3 * size / 50e6)
    return min(asked, walltime / 2.0)


def start(options):
    began = time.time()
    order = read_json(os.path.join(options.run, "order.json"))
    if order is None:
        raise SystemExit("seal.py: error: %s/order.json cannot be read" % options.run)
    version, expected = resolve_base(order, options.workdir)
    claim = {
        "by": "job",
        "job_id": options.job_id,
        "nonce": options.nonce,
        "time": began,
        "host": socket.gethostname(),
        "base": version,
    }
    owner = take_owner(options.run, claim)
    if owner.get("nonce") != options.nonce:
        sys.stderr.write(
            "seal.py: this attempt belongs to %s %s; this copy stops here\n"
            % (owner.get("by", "somebody"), owner.get("job_id") or "")
        )
        write_json(os.path.join(options.run, "fenced"), claim)
        return NOT_OWNER
    model = os.path.join(options.workdir, "models", version)
    subjects = [(os.path.join(options.workdir, "models", s["name"]), s["sha256"]) for s in order.get("subjects", [])]
    folders = [(model, expected)] * (not subjects) + subjects
    problem = next(filter(None, (differs(folder, digest) for folder, digest in folders)), "")
    if not problem and order.get("frozen"):
        problem = frozen_differs(order["frozen"], options.workdir)
    if problem:
        with open(os.path.join(options.run, "problem"), "w") as file:
            file.write(problem)
        sys.stderr.write("seal.py: error: %s\n" % problem)
        return WRONG_BASE
    reserve(options.run)
    sys.stdout.write(environment(options, order, model, [folder for folder, _ in subjects], began))
    return 0


def differs(folder, expected):
    """What is wrong with a model folder, or an empty string."""
    if not os.path.isdir(folder):
        return "the model folder %s is missing" % folder
    if expected and folder_sha256(folder) != expected:
        return "the model in %s is not the one that was ordered: its sha256 differs" % folder
    return ""


def frozen_differs(frozen, workdir, placed=False):
    """What is wrong with the frozen base of an adapter, or an empty string. Its files are hashed once (not by us if
    they were `placed`, hashed, just now); while they look as they did then, by size and time, they are believed."""
    seen = {"folder": frozen["folder"], "files": []}
    for entry in frozen["files"]:
        path = os.path.join(frozen["folder"], entry["path"])
        if not os.path.isfile(path):
            return "%s of the frozen base is missing" % path
        found = os.stat(path)
        if found.st_size != entry["size"]:
            return "%s of the frozen base has %d bytes, not %d" % (path, found.st_size, entry["size"])
        seen["files"].append([entry["path"], entry["sha256"], found.st_size, found.st_mtime_ns])
    note = os.path.join(workdir, "frozen.json")
    if read_json(note) == seen:
        return ""
    for entry in [] if placed else frozen["files"]:
        path = os.path.join(frozen["folder"], entry["path"])
        if sha256_of(path) != entry["sha256"]:
            return "%s is not the frozen base's: its sha256 differs" % path
    write_json(note, seen)
    return ""


def frozen(options):
    """Say what is wrong with the frozen base that stdin tells of: {folder, files: [{path, size, sha256}]}."""
    problem = frozen_differs(json.load(sys.stdin), options.workdir, options.placed)
    sys.stdout.write(problem)
    return WRONG_BASE if problem else 0


def take_checkpoint(run, order):
    """The folder for the program's own checkpoint: what the last attempt at the same task left, moved here, else empty.
    A copy of that attempt which still lives knows it by its old name only, so it has one writer."""
    here = os.path.join(run, "checkpoint")
    for attempt in range(order["attempt"] - 1, 0, -1):
        before = os.path.join(os.path.dirname(os.path.abspath(run)), "%04d-%d" % (order["number"], attempt))
        earlier = read_json(os.path.join(before, "order.json")) or {}
        if all(earlier.get(key) == order.get(key) for key in SAME_TASK):
            try:
                os.rename(os.path.join(before, "checkpoint"), here)
                return here
            except OSError:
                continue
    if not os.path.isdir(here):
        os.makedirs(here)
    return here


def progress_of(run):
    """The whole number in the checkpoint's file `progress`: optimizer steps done; None without one."""
    try:
        descriptor = os.open(os.path.join(run, "checkpoint", "progress"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            text = file.read(32).strip()
    except OSError:
        return None
    return int(text) if re.match(rb"^[0-9]{1,12}$", text) else None


def environment(options, order, model, subjects, began):
    """The job's environment as shell lines."""
    out, state = os.path.join(options.run, "out"), os.path.join(options.workdir, "state")
    os.makedirs(out)
    if not os.path.isdir(state):
        os.makedirs(state)
    size = sum(os.path.getsize(os.path.join(model, n)) for n in os.listdir(model)) if os.path.isdir(model) else 0
    values = [
        ("FLCTL_MODEL", model),
        ("FLCTL_OUT", out),
        ("FLCTL_DATA", options.data),
        ("FLCTL_STATE", state),
        ("FLCTL_CHECKPOINT", take_checkpoint(options.run, order)),
        ("FLCTL_FROZEN", (order.get("frozen") or {}).get("folder", "")),
        ("FLCTL_STOP", os.path.join(options.run, "stop")),
        ("FLCTL_ORDER", os.path.join(options.run, "order.json")),
        ("FLCTL_STEPS", order["steps"]),
        ("FLCTL_GLOBAL_STEP", order["global_step"]),
        ("FLCTL_TOTAL_STEPS", order["total_steps"]),
        ("FLCTL_SEED", order["seed"]),
        ("FLCTL_DEADLINE", int(began + options.walltime - margin_of(order, options.walltime, size))),
        ("FLCTL_SUBJECTS", "\n".join(subjects)),
    ]
    return "".join("export %s=%s\n" % (name, shlex.quote(str(value))) for name, value in values)


def last_error(run):
    """(class, line) of what the job's log says for the record: the last line that names the class of its failure, else
    the last one that names none. Others stay at the site: they may quote data. Each rank may have written one, and a
    launcher its rank in front of it ("1: ", "[1,0]<stdout>:", "[rank0]:")."""
    try:
        with open(os.path.join(run, "log"), "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 65536))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "", ""
    found = [match for match in map(ERROR.match, lines) if match]
    if not found:
        return "", ""
    match = ([match for match in found if match.group(2)] or found)[-1]
    kind, text = match.group(2) or "", match.group(3) if match.group(2) else match.group(1)
    return kind, "".join(c for c in text if c.isprintable())[:300]


def only_numbers(value, depth=0):
    """What of metrics may leave the site: numbers by name, and short plain words such as a device's; never text."""
    if isinstance(value, dict) and depth < 6:
        kept = {k: only_numbers(v, depth + 1) for k, v in value.items() if re.match(r"^[\w./:-]{1,80}$", str(k))}
        return {k: v for k, v in kept.items() if v is not None}
    if isinstance(value, (bool, int, float)):
        return value
    return value if isinstance(value, str) and re.match(r"^[A-Za-z0-9:._-]{1,40}$", value) else None


def judge(options, order, metrics, files):
    """(the reason why this attempt failed, the class of failure that the program named); empty if it did what was
    ordered."""
    if options.signal:
        return "ended by SIG%s (cancelled, preempted or over the time limit)" % options.signal, ""
    if options.status != 0:
        problem = os.path.join(options.run, "problem")
        if os.path.exists(problem):
            with open(problem) as file:
                return file.read()[:300], ""
        kind, said = last_error(options.run)
        if kind:
            return said, kind
        return "the program exited with status %d%s" % (options.status, ": " + said if said else ""), ""
    return shortcoming(order, metrics, files), ""


def shortcoming(order, metrics, files):
    """What a program that exited with status 0 did not leave behind."""
    if not isinstance(metrics, dict):
        return "the program wrote no metrics.json"
    if len(json.dumps(metrics)) > METRICS_MOST:
        return "metrics.json holds more than %d bytes of numbers" % METRICS_MOST
    if order["work"] == "train":
        if not any(entry["path"].endswith(".safetensors") for entry in files):
            return "the program wrote no safetensors"
        for key in ("steps", "samples", "tokens"):
            if type(metrics.get(key)) is not int or metrics[key] < 1:
                return "metrics.json needs a positive whole number `%s`" % key
    return ""


def cause_of(options, reason):
    """Of what kind a failure is: `signal` (ended from outside), `base` (what it was to start from is not there, or not
    what it should be), `program`."""
    if not reason:
        return ""
    if options.signal:
        return "signal"
    problem = os.path.exists(os.path.join(options.run, "problem"))
    return "base" if options.status == WRONG_BASE and problem else "program"


def finish(options):
    owner = read_json(os.path.join(options.run, "owner")) or {}
    if owner.get("nonce") != options.nonce:
        return NOT_OWNER
    record = os.path.join(options.run, "done.json")
    if os.path.exists(record):
        return 0
    order = read_json(os.path.join(options.run, "order.json"))
    out = os.path.join(options.run, "out")
    metrics = only_numbers(read_json(os.path.join(out, "metrics.json")))
    files = [] if options.status != 0 or options.signal else files_below(out)
    reason, failure = judge(options, order, metrics, files)
    if reason and is_full(options.run):
        reason += "; there is no room left for its files (disk full, or quota)"
    remove(os.path.join(options.run, RESERVE))
    counts = metrics if isinstance(metrics, dict) else {}
    base = dict(order["base"], version=int(owner["base"]))
    write_json(
        record,
        {
            "schema": SCHEMA,
            "token": order["token"],
            "campaign": order["campaign"],
            "site": order["site"],
            "number": order["number"],
            "attempt": order["attempt"],
            "work": order["work"],
            "outcome": "failed" if reason else "done",
            "reason": reason,
            "cause": cause_of(options, reason),
            "failure": failure,
            "progress": progress_of(options.run),
            "exit_status": options.status,
            "base": base,
            "steps": counts.get("steps", 0),
            "samples": counts.get("samples", 0),
            "tokens": counts.get("tokens", 0),
            "claimed_at": claimed_at(options.run),
            "started_at": owner["time"],
            "ended_at": time.time(),
            "job_id": owner["job_id"],
            "host": owner["host"],
            "files": files,
            "metrics": metrics,
        },
        options.sign,
    )
    if not reason:
        shutil.rmtree(os.path.join(options.run, "checkpoint"), ignore_errors=True)
    return 0


def claimed_at(run):
    try:
        with open(os.path.join(run, "claim", "at")) as file:
            return float(file.read())
    except (OSError, ValueError):
        return None


def revoke(options):
    """Take the attempt away from every job that has not started. Prints the owner, whoever it is."""
    owner = take_owner(options.run, {"by": "flctl", "job_id": None, "nonce": options.nonce, "time": time.time()})
    json.dump(owner, sys.stdout)
    sys.stdout.write("\n")
    return 0


def main():
    parser = argparse.ArgumentParser(prog="seal.py")
    commands = parser.add_subparsers(dest="command")
    for command in (start, finish, revoke):
        sub = commands.add_parser(command.__name__)
        sub.set_defaults(action=command)
        sub.add_argument("--run", required=True)
        sub.add_argument("--nonce", required=True)
        if command is start:
            sub.add_argument("--workdir", required=True)
            sub.add_argument("--data", required=True)
            sub.add_argument("--walltime", type=float, required=True)
            sub.add_argument("--job-id", default="")
        if command is finish:
            sub.add_argument("--status", type=int, required=True)
            sub.add_argument("--signal", default="")
            sub.add_argument("--sign", default="")
    sub = commands.add_parser("frozen")
    sub.set_defaults(action=frozen, nonce="0")
    sub.add_argument("--workdir", required=True)
    sub.add_argument("--placed", action="store_true")
    options = parser.parse_args()
    if not options.command:
        parser.error("start, finish, revoke or frozen?")
    if not re.match(r"^[A-Za-z0-9]{1,64}$", options.nonce):
        parser.error("a nonce is letters and digits")
    os.umask(0o077)
    try:
        return options.action(options)
    except OSError as error:
        raise SystemExit("seal.py: error: %s" % error) from None


if __name__ == "__main__":
    sys.exit(main())
