"""The workers as they see themselves: `dllama doctor` runs there too, over ssh."""

import json
import subprocess
import time

from dllama.cluster import address
from dllama.doctor.finding import Finding, State
from dllama.errors import ClusterError

SECONDS = 120
"""How long it may take there: on a weak device the program alone takes some time to start."""
CLOCKS_APART = 2.0
"""Seconds; the time that the answer takes is part of the difference."""

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5")

DOCTOR = '"$(command -v dllama-node || echo dllama)" doctor --json'
"""dllama-node is there where Ansible has set the node up, and sees it as the worker's service does."""


def remote_findings(worker: str, user: str = "") -> list[Finding]:
    """What the worker's device finds of itself, and how far its clock is from this one."""
    try:
        host, _ = address.parse(worker)
    except ClusterError:
        return []  # told already
    host = f"{user}@{host}" if user else host
    by_hand = f"ssh {host} dllama-node doctor (dllama doctor, where it was not set up with Ansible)"
    try:
        done = subprocess.run(
            [*SSH, "--", host, DOCTOR],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return [Finding(worker, "ssh", State.UNKNOWN, "there is no ssh here", "sudo apt-get install openssh-client")]
    except subprocess.TimeoutExpired:
        advice = f"try it by hand: {by_hand}"
        return [Finding(worker, "ssh", State.UNKNOWN, f"no answer within {SECONDS} s", advice)]
    here = time.time()
    try:
        told = json.loads(done.stdout)
        findings = [
            Finding(worker, f["check"], State(f["state"]), f["text"], f["advice"], f["value"]) for f in told["findings"]
        ]
        there = float(told["time"])
    except (ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        advice = f"this has to work without a password: {by_hand}"
        return [Finding(worker, "ssh", State.UNKNOWN, said, advice)]
    if abs(there - here) > CLOCKS_APART:
        text = f"{abs(there - here):.0f} s {'ahead of' if there > here else 'behind'} this machine's"
        advice = "there: sudo timedatectl set-ntp true"
        findings.append(Finding(worker, "clock", State.SLOW, text, advice, there - here))
    return findings
