"""What OpenCV decodes images to, in a process with limits, which may die of an image and goes on with the next."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile

TOO_LARGE, DEAD = "larger than allowed", "dead"

CHILD = """
import pickle, resource, sys
import cv2, numpy
files = pickle.load(open(sys.argv[1], "rb"))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
cv2.setNumThreads(1)
with open(sys.argv[2], "wb") as out:
    for data in files[int(sys.argv[3]):]:
        try:
            image = cv2.imdecode(numpy.frombuffer(data, numpy.uint8), cv2.IMREAD_UNCHANGED)
            outcome = image if image is None else (image.shape[1], image.shape[0], image.nbytes)
        except cv2.error as error:
            outcome = "larger than allowed" if "CV_IO_MAX_IMAGE" in str(error) else None
        pickle.dump(outcome, out)
        out.flush()
"""


def decoded_sizes(files: list[bytes], max_pixels: int) -> list[tuple[int, int, int] | str | None]:
    """Of each file (width, height, bytes) as cv2.imdecode has them, TOO_LARGE where OpenCV read a size of more than
    max_pixels, DEAD where it ended the process, None where it decodes nothing."""
    outcomes: list = []
    with tempfile.TemporaryDirectory() as folder:
        given, told = f"{folder}/given", f"{folder}/told"
        with open(given, "wb") as file:
            pickle.dump(files, file)
        environment = {**os.environ, "OPENCV_IO_MAX_IMAGE_PIXELS": str(max_pixels), "OPENCV_LOG_LEVEL": "SILENT"}
        while len(outcomes) < len(files):
            command = [sys.executable, "-c", CHILD, given, told, str(len(outcomes))]
            done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, timeout=300)
            before = len(outcomes)
            with open(told, "rb") as file:
                while True:
                    try:
                        outcomes.append(pickle.load(file))
                    except (EOFError, pickle.UnpicklingError):
                        break
            if len(outcomes) < len(files):
                if done.returncode >= 0:
                    raise AssertionError(f"the decoding process failed: {done.stderr.decode()[-2000:]}")
                outcomes.append(DEAD)
            assert len(outcomes) > before
    return outcomes
