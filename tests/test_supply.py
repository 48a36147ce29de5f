"""What the project stands on: licences of the packages, a bill of materials, and an audit that says when it is none."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from email.message import Message
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def licences():
    spec = importlib.util.spec_from_file_location("licences", PROJECT / ".ci/licences.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["licences"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("MIT", "permissive"),
        ("Apache-2.0 AND MIT", "permissive"),
        ("MPL-2.0 AND MIT", "weak copyleft"),
        ("LGPL-2.1-or-later", "weak copyleft"),
        ("GNU Lesser General Public License v3", "weak copyleft"),
        ("GPL-3.0-only", "copyleft"),
        ("GPL-2.0-only OR EPL-1.0", "weak copyleft"),
        ("GPL-3.0-only OR MIT", "permissive"),
        ("AGPL-3.0-only", "network copyleft"),
        ("LicenseRef-NVIDIA-Proprietary", "proprietary"),
        ("", "unknown"),
        ("see our page", "unknown"),
    ],
)
def test_what_a_package_says_is_of_a_kind_and_of_several_offers_the_mildest(licences, says: str, kind: str) -> None:
    assert licences.Package("x", "1", says, ()).kind == kind


def test_an_expression_comes_before_classifiers_and_these_before_the_old_field(licences) -> None:
    about = Message()
    about["Name"], about["License"] = "x", "BSD\nlong text"
    assert licences.licence_of(about) == "BSD"
    about["Classifier"] = "License :: OSI Approved :: MIT License"
    assert licences.licence_of(about) == "MIT License"
    about["License-Expression"] = "Apache-2.0"
    assert licences.licence_of(about) == "Apache-2.0"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("licences")
    command = [sys.executable, str(PROJECT / ".ci/licences.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_every_package_here_has_a_known_licence_and_notice_names_those_with_further_terms(written, licences) -> None:
    rows = re.findall(r"^\| ([\w-]+) \| \S+ \| ([\w ]+) \|", (written / "licences.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 100
    notice = (PROJECT / "NOTICE").read_text()
    for name, kind in rows:
        if kind not in ("permissive", "kind"):
            assert name in notice or (name.startswith("nvidia-") and "nvidia-*" in notice), f"NOTICE: {name} is {kind}"


def test_the_bill_of_materials_is_cyclonedx_and_its_references_meet(written) -> None:
    bill = json.loads((written / "sbom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    refs = {part["bom-ref"] for part in bill["components"]} | {bill["metadata"]["component"]["bom-ref"]}
    for part in bill["components"]:
        assert part["type"] == "library" and part["purl"] == f"pkg:pypi/{part['name']}@{part['version']}"
    for entry in bill["dependencies"]:
        assert entry["ref"] in refs and set(entry["dependsOn"]) <= refs
    torch = next(entry for entry in bill["dependencies"] if "/torch@" in entry["ref"])
    assert any("/sympy@" in needed for needed in torch["dependsOn"])


def test_the_same_environment_gives_the_same_bill(written, licences) -> None:
    assert json.loads((written / "sbom.cdx.json").read_text()) == licences.bill_of_materials(licences.packages())


def audit(tmp_path: Path, answer: str, status: int) -> subprocess.CompletedProcess:
    """The audit with a uv in front of the path that answers in pip-audit's place."""
    uv = tmp_path / "uv"
    uv.write_text(f"""#!/usr/bin/env bash
while [ $# -gt 0 ]; do if [ "$1" = --output ]; then out=$2; fi; shift; done
printf '%s' '{answer}' > "$out"
echo "no answer from the index" >&2
exit {status}
""")
    uv.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([str(PROJECT / ".ci/audit")], env=env, capture_output=True, text=True)


def test_without_the_network_the_audit_says_that_nothing_was_checked(tmp_path: Path) -> None:
    done = audit(tmp_path, "", 1)
    assert done.returncode == 2
    assert "nothing was checked" in done.stderr and "no answer from the index" in done.stderr


def test_a_vulnerability_is_named_with_the_version_that_mends_it(tmp_path: Path) -> None:
    vulnerable = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    found = json.dumps({"dependencies": [vulnerable, {"name": "b", "version": "3", "vulns": []}]})
    done = audit(tmp_path, found, 1)
    assert done.returncode == 1
    assert "audit: a 1: CVE-1, mended in 2" in done.stdout and "2 packages read, 1 vulnerabilities known" in done.stdout


def test_nothing_known_is_status_0_and_packages_that_were_not_read_are_named(tmp_path: Path) -> None:
    found = json.dumps(
        {"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "x"}]}
    )
    done = audit(tmp_path, found, 0)
    assert done.returncode == 0 and "1 packages read" in done.stdout and "not read: b" in done.stdout
