"""Signed completion records: real ssh-keygen signs at the site and verifies at home; where signers are pinned, nothing
else is a success."""

import json
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from flctl.campaign.signing import record_of
from flctl.facility.profile import Signing
from flctl.facility.signatures import NAMESPACE, fault, signer_of
from tests.campaigns import Campaign
from tests.ssh_sites import keygen, local_site

SEAL = Path(__file__).parent.parent / "flctl" / "payload" / "seal.py"


def public(key: Path) -> str:
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


def signed(key: Path, content: bytes, namespace: str = NAMESPACE) -> str:
    path = key.parent / "content"
    path.write_bytes(content)
    path.with_name("content.sig").unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-n", namespace, "-f", key, path], check=True)
    return path.with_name("content.sig").read_text()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return keygen(tmp_path / "key")


def pin(campaign: Campaign, name: str, key: Path | str, *signers: str) -> None:
    path = campaign.place / "sites" / f"{name}.toml"
    text = path.read_text().partition("[signing]")[0]
    path.write_text(f'{text}\n[signing]\nkey = "{key}"\nsigners = {json.dumps(signers)}\n')


RECORD = b'{"outcome": "done", "signed": true}\n'


def test_a_signature_counts_for_its_bytes_its_key_its_purpose_and_its_site(key: Path, tmp_path: Path) -> None:
    other, mine = public(keygen(tmp_path / "other")), public(key)
    signature = signed(key, RECORD)
    assert fault(RECORD, signature, "brno", mine) == ""
    assert signer_of(RECORD, signature, "brno", (other, mine)) == mine
    assert signer_of(RECORD, signature, "brno", (other,)) is None
    assert fault(RECORD, signed(key, RECORD, "git"), "brno", mine)
    assert fault(RECORD, "", "brno", mine) == "there is no signature"
    assert "too long" in fault(RECORD, signature * 100, "brno", mine)
    for place in range(len(RECORD)):
        changed = bytearray(RECORD)
        changed[place] ^= 1
        if place % 7 == 0:
            assert fault(bytes(changed), signature, "brno", mine), place


def test_a_byte_of_the_signature_that_is_changed_is_noticed(key: Path) -> None:
    signature = signed(key, RECORD)
    lines = signature.splitlines()
    for number in range(1, len(lines) - 1):
        letter = "A" if lines[number][5] != "A" else "B"
        changed = [*lines[:number], lines[number][:5] + letter + lines[number][6:], *lines[number + 1 :]]
        assert fault(RECORD, "\n".join(changed) + "\n", "brno", public(key)), number


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_keys_of_every_kind_that_a_profile_may_pin_count(kind: str, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", tmp_path / "key"], check=True)
    assert fault(RECORD, signed(tmp_path / "key", RECORD), "brno", public(tmp_path / "key")) == ""


def test_without_pinned_signers_a_record_counts_as_it_is(key: Path) -> None:
    site = local_site()
    assert record_of(site, RECORD.decode(), "") == json.loads(RECORD)
    pinned = Signing(key=str(key), signers=(public(key),))
    found = record_of(_with(pinned), RECORD.decode(), "")
    assert found is not None
    assert (found["outcome"], found["reason"]) == (
        "failed",
        "the completion record does not count: there is no signature",
    )
    failed = '{"outcome": "failed", "reason": "the data is spoilt"}'
    assert record_of(_with(pinned), failed, "") == json.loads(failed)
    assert record_of(_with(pinned), "no json", "") is None


def _with(signing: Signing):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(local_site(), signing=signing)


def test_a_round_of_signed_records_is_made_kept_and_audited(tmp_path: Path, key: Path) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno", "pisa"))
    pin(campaign, "brno", key, public(keygen(tmp_path / "old")), public(key))
    ran = campaign.flctl("round")
    assert ran.returncode == 0, ran.stderr
    folder = campaign.place / "runs" / "brno" / "0001" / "1"
    content, signature = (folder / "done.json").read_bytes(), (folder / "done.json.sig").read_text()
    assert json.loads(content)["signed"] is True
    assert fault(content, signature, "brno", public(key)) == ""
    assert content == (campaign.remote("brno") / "runs" / "0001-1" / "done.json").read_bytes()
    assert not (campaign.place / "runs" / "pisa" / "0001" / "1" / "done.json.sig").exists()
    assert campaign.json("audit")["data"]["differences"] == []
    pin(campaign, "brno", key, public(tmp_path / "old"))
    (difference,) = campaign.json("audit", code=8)["data"]["differences"]
    assert (difference["file"], difference["round"]) == ("runs/brno/0001/1/done.json.sig", 1)
    assert "does not count any more" in difference["what"]


def test_a_rebuilt_folder_believes_signed_records_only_and_journals_what_it_read(tmp_path: Path, key: Path) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno",))
    pin(campaign, "brno", key, public(key))
    campaign.json("round", "--rounds", "3")
    label, runs = campaign.remote("brno").name, campaign.remote("brno") / "runs"
    record = runs / "0001-1" / "done.json"
    record.write_bytes(record.read_bytes().replace(b'"samples": 10', b'"samples": 90'))
    profile = shutil.copy(campaign.place / "sites" / "brno.toml", tmp_path)
    campaign.place = tmp_path / "new"
    done = campaign.flctl("adopt", str(campaign.place), "--sites", profile, "--id", label, at=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = campaign.run("brno", 1), campaign.run("brno", 2)
    assert (first["stage"], second["stage"], second["contribution"]["samples"]) == ("failed", "fetched", 10)
    assert "the completion record does not count" in first["failure"]["message"]
    assert campaign.json("audit")["data"]["differences"] == []
    read = {entry["path"]: entry["sha256"] for entry in campaign.journal() if entry["event"] == "file"}
    for name in ("order.json", "done.json", "done.json.sig"):
        for attempt in ("0001-1", "0002-1", "0003-1"):
            assert read[f"runs/{attempt}/{name}"] == sha256((runs / attempt / name).read_bytes()).hexdigest()


def test_a_key_that_is_not_pinned_makes_no_success(tmp_path: Path, key: Path) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno",))
    pin(campaign, "brno", key, public(keygen(tmp_path / "other")))
    ran = campaign.flctl("round")
    assert ran.returncode == 6
    assert "the completion record does not count: " in ran.stderr
    assert campaign.run("brno")["stage"] == "failed"
    assert not (campaign.place / "models" / "0001").exists()


def test_a_site_that_cannot_sign_says_so_in_its_record_and_fails_where_signers_are_pinned(
    tmp_path: Path, key: Path
) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno",))
    pin(campaign, "brno", tmp_path / "nothing", public(key))
    ran = campaign.flctl("round")
    assert ran.returncode == 6
    assert "there is no signature; it says: not signed: " in ran.stderr
    pin(campaign, "brno", tmp_path / "nothing")
    assert campaign.flctl("retry", "brno").returncode == 0
    ran = campaign.flctl("round")
    assert ran.returncode == 0, ran.stderr
    record = json.loads((campaign.place / "runs" / "brno" / "0001" / "2" / "done.json").read_text())
    assert record["signed"].startswith("not signed: ")


def test_a_template_that_signs_nothing_is_refused_where_signers_are_pinned(tmp_path: Path, key: Path) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno",))
    pin(campaign, "brno", key, public(key))
    path = campaign.place / "templates" / "local.sh"
    path.write_text(path.read_text().replace(" --sign {{signing_key}}", ""))
    ran = campaign.flctl("round", "--wait", "20s")
    assert ran.returncode != 0
    assert "signs no records" in ran.stderr
    assert campaign.run("brno")["stage"] == "ordered"


def test_a_profile_that_pins_signers_names_the_key(tmp_path: Path, key: Path) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno",))
    pin(campaign, "brno", "", public(key))
    ran = campaign.flctl("round", "--dry-run")
    assert ran.returncode == 3
    assert "signing.key" in ran.stderr


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("#!/bin/sh\necho 'unknown option -- Y' >&2; exit 1\n", "not signed: ssh-keygen is older than OpenSSH 8.1"),
        (f'#!/bin/sh\nexec {shutil.which("ssh-keygen")} "$@"\n', "not signed: "),  # its key has a passphrase
        (None, "not signed: ssh-keygen cannot be run: No such file or directory"),
    ],
)
def test_the_record_is_written_whatever_ssh_keygen_does(tmp_path: Path, program: str | None, words: str) -> None:
    run, tools = tmp_path / "run", tmp_path / "bin"
    for folder in (run / "out", tools):
        folder.mkdir(parents=True)
    order = {"token": "f", "campaign": "c", "site": "brno", "number": 1, "attempt": 1, "work": "evaluate"}
    (run / "order.json").write_text(json.dumps({**order, "base": {"version": 0, "sha256": "0"}}))
    (run / "owner").write_text(json.dumps({"nonce": "n", "base": "0000", "time": 1, "job_id": "5", "host": "h"}))
    (run / "out" / "metrics.json").write_text('{"loss": 1}')
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", tmp_path / "key"], check=True)
    if program:
        (tools / "ssh-keygen").write_text(program)
        (tools / "ssh-keygen").chmod(0o755)
    done = subprocess.run(
        [sys.executable, SEAL, "finish", "--run", run, "--nonce", "n", "--status", "0", "--sign", tmp_path / "key"],
        env={"PATH": f"{tools}"},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    record = json.loads((run / "done.json").read_text())
    assert record["outcome"] == "done"
    assert record["signed"].startswith(words)
    assert not (run / "done.json.sig").exists()


def test_site_test_tries_whether_the_site_can_sign(tmp_path: Path, key: Path) -> None:
    campaign = Campaign(tmp_path / "camp", ("brno",))
    other = public(keygen(tmp_path / "other"))
    for path, signer, result in ((key, public(key), "ok"), (key, other, "fail")):
        pin(campaign, "brno", path, signer)
        (site,) = campaign.json("site", "test", code=None)["data"]["sites"]
        found = {check["name"]: check for check in site["checks"]}
        assert found["signing"]["result"] == result, found["signing"]
