"""Reads an offline W&B run back: records of protobuf in blocks, as LevelDB's log has them."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file; a long one lies in several parts."""
    data = path.read_bytes()
    at, parts = FILE_HEADER, b""
    while at + RECORD_HEADER <= len(data):
        if BLOCK - at % BLOCK < RECORD_HEADER:  # the rest of a block that no header fits into is padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        at += RECORD_HEADER
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""


def history(folder: Path) -> dict[str, list[Any]]:
    """Everything that the one run below ``folder`` logged, by key, in order."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    found = defaultdict(list)
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row: dict[str, Any] = {}
        for item in record.history.item:
            value = json.loads(item.value_json)
            if len(item.nested_key) > 1:
                row.setdefault(item.nested_key[0], {})[item.nested_key[1]] = value
            else:
                row[item.key or item.nested_key[0]] = value
        for key, value in row.items():
            found[key].append(value)
    return dict(found)
