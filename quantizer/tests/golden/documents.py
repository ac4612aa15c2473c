#!/usr/bin/env python3
"""Writes documents.parquet and documents.jsonl: the same documents, by pyarrow and by json.

    pip install pyarrow==26.0.1 && python3 documents.py

The Parquet file has two row groups, and columns in every supported compression, with and without a dictionary.
"""

import json
from pathlib import Path

import pyarrow
from pyarrow import parquet

DOCUMENTS = [
    {
        "id": 1,
        "messages": [
            {"role": "system", "content": "w1"},
            {"role": "user", "content": "w2 w3", "name": "w4"},
            {"role": "assistant", "content": "w5"},
        ],
    },
    {"id": 2, "text": "w6 w7 – ü\n"},
    {"id": 3, "prompt": "w8", "completion": "w9"},
    {"id": 4, "instruction": "w10", "input": "w11", "output": "w12", "system": "w13"},
    {"id": 5},
    {"id": 6, "messages": []},
    {"id": 7, "conversations": [{"from": "human", "value": "w14"}, {"from": "gpt", "value": "w15"}]},
    {"id": 8, "text": " "},
    {"id": 9, "messages": [{"role": "user", "content": "w16"}, {"role": "tool"}]},
]

TEXT = pyarrow.string()
SCHEMA = pyarrow.schema(
    {
        "id": pyarrow.int64(),
        "messages": pyarrow.list_(pyarrow.struct({"role": TEXT, "content": TEXT, "name": TEXT})),
        "conversations": pyarrow.large_list(pyarrow.struct({"from": TEXT, "value": TEXT})),
        "text": pyarrow.large_string(),
        "prompt": TEXT,
        "completion": pyarrow.binary(),
        "instruction": TEXT,
        "input": TEXT,
        "output": TEXT,
        "system": TEXT,
    }
)
COMPRESSION = {
    "messages.list.element.role": "snappy",
    "messages.list.element.content": "zstd",
    "messages.list.element.name": "none",
    "text": "gzip",
    "prompt": "zstd",
}


def main():
    here = Path(__file__).parent
    rows = [{**row, "completion": row["completion"].encode()} if "completion" in row else row for row in DOCUMENTS]
    parquet.write_table(
        pyarrow.Table.from_pylist(rows, schema=SCHEMA),
        here / "documents.parquet",
        row_group_size=5,
        use_dictionary=["messages.list.element.role", "text"],
        data_page_version="2.0",
        compression={name: COMPRESSION.get(name, "snappy") for name in parquet_columns()},
        store_schema=False,
    )
    lines = [json.dumps(row, ensure_ascii=False) for row in DOCUMENTS]
    (here / "documents.jsonl").write_text("\n".join(lines) + "\n")


def parquet_columns():
    """The names that pyarrow gives the leaves of the schema."""
    for field in SCHEMA:
        if pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type):
            yield from (f"{field.name}.list.element.{leaf.name}" for leaf in field.type.value_type)
        else:
            yield field.name


if __name__ == "__main__":
    main()
