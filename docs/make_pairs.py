"""Every held-out picture with several others as exemplars: `python docs/make_pairs.py FOLDER COUNT > pairs.jsonl`.

The exemplars are the COUNT pictures that follow it among those that the prepared FOLDER holds out, the first after the
last. One pair record a line on stdout, with absolute paths.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from cocosnet.data.records import Record, read_manifest


def main(folder: str, count: str) -> None:
    """Print the records."""
    held_out = [record for record in read_manifest(folder) if record.extra.get("split") == "val"]
    for record in pairs(held_out, int(count)):
        print(record.to_json())


def pairs(records: list[Record], count: int) -> Iterator[Record]:
    """Each record with each of its `count` followers' pictures as exemplar."""
    for index, record in enumerate(records):
        for step in range(1, min(count, len(records) - 1) + 1):
            other = records[(index + step) % len(records)]
            yield Record(
                id=f"{record.id}-{step}",
                condition=record.condition,
                exemplar=other.target,
                exemplar_condition=other.condition,
                target=record.target,
            )


if __name__ == "__main__":
    main(*sys.argv[1:3])
