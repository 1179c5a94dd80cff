"""What the double tells of itself: its server, its queue, its node."""

import time
from typing import Any

from .client import VERSION
from .jobs import Job
from .machine import Machine


def node(machine: Machine) -> dict[str, Any]:
    busy = sum(running.job.ncpus for running in machine.running)
    return {
        "Mom": machine.name,
        "ntype": "PBS",
        "state": "free" if busy < machine.ncpus else "job-busy",
        "pcpus": machine.ncpus,
        "resources_available": {
            "arch": "linux",
            "host": machine.name,
            "mem": "24684084kb",
            "ncpus": machine.ncpus,
            "vnode": machine.name,
        },
        "resources_assigned": {"ncpus": busy} if busy else {},
        "resv_enable": "True",
        "sharing": "default_shared",
        "license": "l",
        "last_state_change_time": int(time.time()),
        "last_used_time": int(time.time()),
    }


def _counts(machine: Machine) -> str:
    letters = {
        "Transit": "T",
        "Queued": "Q",
        "Held": "H",
        "Waiting": "W",
        "Running": "R",
        "Exiting": "E",
        "Begun": "B",
    }
    states = [job.state for job in machine.jobs.values()]
    return "".join(f"{name}:{states.count(letter)} " for name, letter in letters.items())


def _assigned(machine: Machine) -> dict[str, int]:
    running = [one.job for one in machine.running]
    return {"ncpus": sum(job.ncpus for job in running), "nodect": sum(job.chunks for job in running)}


def queue(machine: Machine) -> dict[str, Any]:
    return {
        "queue_type": "Execution",
        "total_jobs": sum(job.state != "F" for job in machine.jobs.values()),
        "state_count": _counts(machine),
        "resources_assigned": _assigned(machine),
        "enabled": "True",
        "started": "True",
    }


def server(machine: Machine) -> dict[str, Any]:
    return {
        "server_state": "Active",
        "server_host": machine.name,
        "scheduling": "True",
        "total_jobs": sum(1 + len(_indices(job)) for job in machine.jobs.values()),
        "state_count": _counts(machine),
        "default_queue": "workq",
        "log_events": 511,
        "mailer": "/usr/sbin/sendmail",
        "mail_from": "adm",
        "query_other_jobs": "True",
        "resources_default": {"ncpus": 1},
        "default_chunk": {"ncpus": 1},
        "resources_assigned": _assigned(machine),
        "scheduler_iteration": 600,
        "resv_enable": "True",
        "node_fail_requeue": 310,
        "max_array_size": 10000,
        "resend_term_delay": 5,
        "pbs_license_min": 0,
        "pbs_license_max": 2147483647,
        "pbs_license_linger_time": 31536000,
        "license_count": "Avail_Global:1000000 Avail_Local:1000000 Used:0 High_Use:0",
        "pbs_version": VERSION,
        "eligible_time_enable": "False",
        "job_history_enable": "True" if machine.history else "False",
        "max_concurrent_provision": 5,
        "clear_topjob_estimates_enable": "False",
        "max_job_sequence_id": 9999999,
    }


def _indices(job: Job) -> range:
    first, _, last = job.array.partition("-")
    return range(int(first), int(last) + 1) if job.array else range(0)
