"""What no aggregation can do without, alone and without flctl: every input read once, one output written once.

Run as a program of its own, by path, so that it starts nothing but the interpreter. Prints its parts as JSON."""

import argparse
import hashlib
import json
import os
import time

BLOCK = 256 << 10  # the fastest here: larger writes take larger pages, which a hypervisor may have to find first


def copied(files: list[str], out: str, size: int) -> dict[str, float]:
    """Seconds of reading the files one after the other, of writing `size` bytes, and of bringing these to the disk."""
    block = memoryview(bytearray(BLOCK))
    began = time.perf_counter()
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        offset = 0
        while count := os.preadv(descriptor, [block], offset):
            offset += count
        os.close(descriptor)
    read = time.perf_counter()
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    while size:
        size -= os.write(descriptor, block[:size])
    written = time.perf_counter()
    os.fsync(descriptor)
    os.close(descriptor)
    return {"read": read - began, "write": written - read, "sync": time.perf_counter() - written}


def hashed(files: list[str]) -> dict[str, float]:
    block = memoryview(bytearray(BLOCK))
    began = time.perf_counter()
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb", buffering=0) as source:  # noqa: PTH123  pathlib would have to be imported
            while count := source.readinto(block):
                digest.update(block[:count])
    return {"hash": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--out", help="write --size bytes there; without it the files are hashed")
    parser.add_argument("--size", type=int, default=0)
    options = parser.parse_args()
    parts = copied(options.files, options.out, options.size) if options.out else hashed(options.files)
    print(json.dumps(parts))


if __name__ == "__main__":
    main()
