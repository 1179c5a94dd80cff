"""One facility of the testbed: an account with a private home, its sshd, its Slurm cluster, its data, its profile."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import texts
from .accounts import Account, account
from .python import PYTHON
from .slurm import Slurm
from .sshd import Sshd


@dataclass(frozen=True, slots=True, kw_only=True)
class Facility:
    name: str
    language: str  # of its text
    account_name: str
    sshd: Sshd
    slurm: Slurm

    @property
    def account(self) -> Account:
        return account(self.account_name)

    @property
    def home(self) -> Path:
        return self.account.home

    @property
    def workdir(self) -> Path:
        return self.home / "work"

    @property
    def data(self) -> Path:
        return self.home / "data"

    def start(self) -> None:
        owner = self.account
        owner.folder(self.workdir)
        texts.put(self.language, owner, self.data)
        self.slurm.start()
        self.sshd.start(fresh=True)

    def stop(self) -> None:
        self.sshd.stop()
        self.slurm.stop()
        self.account.end_processes()

    @property
    def running(self) -> bool:
        return self.sshd.running and self.slurm.running

    def profile(self, *, key: Path, secret: str = "", **tables: Mapping[str, Any]) -> dict[str, Any]:
        """The site's profile; `tables` are laid over it, key by key (`poll={"every": 5}`, `login={"totp": {...}}`)."""
        login: dict[str, Any] = {
            "host": self.sshd.address,
            "port": self.sshd.port,
            "user": self.account_name,
            "kind": self.sshd.kind,
            "key": str(key),
            "host_keys": [self.sshd.host_key_fingerprint],
            "per_day": 100_000,
        }
        if self.sshd.kind == "key+totp":
            login["totp"] = {
                "automation": "permitted",
                "permission": "granted for the testbed by its own operators",
                "secret": secret,
                "period": self.sshd.period,
                "digits": self.sshd.digits,
            }
        profile: dict[str, Any] = {
            "schema": 1,
            "name": self.name,
            "title": f"testbed facility {self.name}",
            "connection": "ssh",
            "login": login,
            "scheduler": {
                "kind": "slurm",
                "account": "testbed",
                "partition": self.slurm.partitions[0],
                "shape": "prod",
                "accounting": self.slurm.accounting is not None,
            },
            "shapes": {"prod": {"nodes": 1, "gpus": 0, "walltime": "00:10:00"}},
            "storage": {"work": str(self.workdir), "data": str(self.data)},
            "environment": {"python": str(PYTHON), "seal_python": "/usr/bin/python3"},
            "poll": {"every": 1, "login_every": 2, "absence": 3, "claim_window": 20},
        }
        return _overlaid(profile, tables)


def _overlaid(profile: dict[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(profile)
    for name, value in tables.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), dict)
        result[name] = _overlaid(result[name], value) if both else value
    return result


def toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """The TOML of nested tables of strings, numbers, booleans and lists (whose JSON is TOML as well)."""
    plain = [f"{key} = {json.dumps(value)}\n" for key, value in table.items() if not isinstance(value, Mapping)]
    head = f"\n[{prefix}]\n" if prefix and (plain or not table) else ""
    nested = [toml(value, f"{prefix}.{key}".lstrip(".")) for key, value in table.items() if isinstance(value, Mapping)]
    return head + "".join(plain) + "".join(nested)
