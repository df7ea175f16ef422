"""The compiled libraries of a GPU run: whether those that are there are of these sources, and the build of new ones."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from _workers import end_group, shorten

ROOT = Path(__file__).resolve().parent.parent


def source_digest() -> str:
    """Names the state of csrc/, as setup.py writes it into the CUDA library."""
    digest = hashlib.sha256()
    for name in sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()


def library_state(library: Path) -> str:
    """ "matches", or why a CUDA library is not to be used."""
    if not library.exists():
        return "not built"
    found = re.search(rb"fastllm-sources:([0-9a-f]{64})", library.read_bytes())
    if found is None:
        return "does not say which sources it was built from"
    return "matches" if found[1].decode() == source_digest() else "was built from other sources"


class Build:
    """setup.py in the background, into a folder of its own: nobody loads a library that is half written."""

    def __init__(self, log: Path, environment: dict[str, str], cuda: bool):
        self.cuda, self.log, self.note = cuda, log, ""
        self.folder = Path(tempfile.mkdtemp(prefix="fastllm-build-"))
        command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(self.folder / "lib")]
        command += ["--build-temp", str(self.folder / "temp")]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=environment
            )

    def wait(self, seconds: float) -> bool:
        """Waits until the build ends, and takes over what was built; returns False if it goes on after `seconds`."""
        if self.note:
            return True
        try:
            code = self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
        if code == 0:
            for built in (self.folder / "lib/fastllm").glob("_C*.so"):
                take_over(built, ROOT / "fastllm" / built.name)
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        self.note = "built" if code == 0 else f"the build failed: {shorten(' '.join(last))}"
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    def end(self) -> None:
        """Ends the build if it goes on."""
        if not self.wait(0):
            end_group(self.process)
            self.note = "the build was out of time"
            shutil.rmtree(self.folder, ignore_errors=True)


def take_over(built: Path, library: Path) -> None:
    """Puts a library in its place, and one that was there beside it, as `<name>.before.so`."""
    partial = library.with_name(f"{library.name}.{os.getpid()}")
    shutil.copyfile(built, partial)
    if library.exists():
        library.replace(library.with_name(f"{library.stem}.before.so"))
    partial.replace(library)
