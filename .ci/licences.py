"""`make licences`: under which terms the packages of this environment may be used, by their own metadata.

    reports/licences.md      a table; those with obligations or without an answer first
    reports/sbom.cdx.json    the same as a bill of materials (CycloneDX 1.6), for whoever scans images

Metadata is what a package says of itself: no lawyer's word. Status 1 where a package says nothing that is known here.
Both files are the same for the same environment.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OWN = "raphael"
# The first kind whose pattern is found in what a package says decides: what asks for more stands before what asks less.
KINDS = {
    "proprietary": r"proprietary|nvidia|eula|all rights reserved",
    "network copyleft": r"\bagpl|affero",
    "weak copyleft": r"lgpl|lesser general|mpl|mozilla|\bepl|eclipse",
    "copyleft": r"\bgpl|gnu general public|general public license",
    "permissive": r"mit\b|mit-cmu|bsd|apache|isc\b|python software foundation|\bpsf|zlib|unlicense|public domain|"
    r"hpnd|historical permission|\b0bsd|cc0|boost|zope|artistic|cnri|blueoak",
}
ORDER = ("proprietary", "network copyleft", "copyleft", "weak copyleft", "unknown", "permissive")
OFFERED = re.compile(r"\s+or\s+", re.IGNORECASE)  # of several terms that are offered, the mildest may be taken
# Packages whose metadata say nothing, or less than the licence files that they come with.
READ = {
    "cuda-toolkit": "NVIDIA Proprietary (a list of packages, no files of its own)",
    "grandalf": "GPL-2.0-only OR EPL-1.0",
    "huey": "MIT",
    "skops": "MIT",
    "text-unidecode": "Artistic-1.0-Perl OR GPL-1.0-or-later",
}
CLASSIFIER = "License :: "


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    says: str
    needs: tuple[str, ...]

    @property
    def kind(self) -> str:
        offered = [_kind(part) for part in OFFERED.split(self.says)]
        return max(offered, key=ORDER.index) if "unknown" not in offered else _kind(self.says)

    @property
    def purl(self) -> str:
        return f"pkg:pypi/{self.name}@{self.version}"


def _kind(says: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, says, re.IGNORECASE)), "unknown")


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence_of(about: metadata.PackageMetadata) -> str:
    """What was read where somebody did; else the expression, else classifiers, else the old field's first line."""
    if read := READ.get(normalised(about["Name"])):
        return read
    expression = about.get("License-Expression")
    classifiers = [text.split(" :: ")[-1] for text in about.get_all("Classifier") or () if text.startswith(CLASSIFIER)]
    classifiers = [text for text in classifiers if text != "OSI Approved"]
    field = (about.get("License") or "").strip().splitlines()
    return expression or " AND ".join(classifiers) or (field[0][:80] if field else "")


def packages() -> list[Package]:
    found: dict[str, Package] = {}
    for distribution in metadata.distributions():
        about = distribution.metadata
        name = normalised(about["Name"] or "")
        if name and name not in found:
            found[name] = Package(
                name, distribution.version, licence_of(about), tuple(sorted(set(_needs(distribution))))
            )
    return [found[name] for name in sorted(found)]


def _needs(distribution: metadata.Distribution) -> Iterator[str]:
    """Names of what it asks for here: extras that nobody asked for are left out."""
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        if "extra" not in marker:
            yield normalised(re.match(r"[\w.-]+", requirement.strip())[0])


def table(found: list[Package]) -> str:
    lines = [
        "# Licences of the packages of this environment",
        "",
        "By the packages' own metadata (`make licences`). Of several terms that are offered, the mildest counts.",
        "",
    ]
    counts = {kind: [package for package in found if package.kind == kind] for kind in ORDER}
    lines += [f"- {kind}: {len(those)}" for kind, those in counts.items() if those]
    lines += ["", "| package | version | kind | says |", "| --- | --- | --- | --- |"]
    for those in counts.values():
        for package in those:
            says = package.says.replace("|", "\\|") or "nothing"
            lines.append(f"| {package.name} | {package.version} | {package.kind} | {says} |")
    return "\n".join(lines) + "\n"


def bill_of_materials(found: list[Package]) -> dict:
    """CycloneDX 1.6. Its serial number is made of its content."""
    here = {package.name: package.purl for package in found}
    own = next((package for package in found if package.name == OWN), None)
    components = [
        {
            "type": "library",
            "bom-ref": package.purl,
            "name": package.name,
            "version": package.version,
            "purl": package.purl,
            "licenses": [{"license": {"name": package.says}}] if package.says else [],
        }
        for package in found
        if package.name != OWN
    ]
    depends = [
        {"ref": package.purl, "dependsOn": [here[name] for name in package.needs if name in here]} for package in found
    ]
    bill: dict = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    content = json.dumps([components, depends], sort_keys=True)
    bill["serialNumber"] = f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}"
    if own:
        bill["metadata"] = {
            "component": {"type": "application", "bom-ref": own.purl, "name": own.name, "version": own.version}
        }
    return {**bill, "components": components, "dependencies": depends}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="licences", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("reports"), help="a folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    found = packages()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "licences.md").write_text(table(found), encoding="utf-8")
    bill = json.dumps(bill_of_materials(found), indent=1) + "\n"
    (arguments.out / "sbom.cdx.json").write_text(bill, encoding="utf-8")
    silent = [package.name for package in found if package.kind == "unknown" and package.name != OWN]
    notable = [package.name for package in found if package.kind not in ("permissive", "unknown")]
    print(f"licences: {len(found)} packages; terms beyond a permissive licence: {', '.join(notable) or 'none'}")
    print(f"licences: {arguments.out / 'licences.md'}, {arguments.out / 'sbom.cdx.json'}")
    if silent:
        print(f"licences: nothing known of {', '.join(silent)}: read their licence files, then READ", file=sys.stderr)
    return 1 if silent else 0


if __name__ == "__main__":
    raise SystemExit(main())
