//! Rows of Parquet files as the JSON values that a JSONL file of the same documents would have.
//!
//! Only the columns that documents are read from are read. Pages may be plain or compressed by Snappy, gzip or
//! Zstandard.

use std::fs::File;
use std::path::Path;

use nibble_model::error::CheckpointError;
use parquet::basic::{ConvertedType, Repetition};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::Value as Json;

use super::document::{FIELDS, HELP, quoted};
use super::files::{Located, Place, refusal};
use crate::error::QuantizeError;

/// The thread that decodes Parquet files. The decoder panics at some damaged files: a panic of this thread is
/// reported as the error that it is, and needs no message of its own.
pub const PARQUET_THREAD: &str = "parquet";

/// The rows of `file`, with `field` or with the known fields.
///
/// # Errors
/// When the file cannot be read, is not Parquet, or has none of these columns.
pub(super) fn read(file: &Path, field: Option<&str>) -> Result<Vec<Located>, QuantizeError> {
    std::thread::scope(|scope| {
        let decoder = std::thread::Builder::new().name(PARQUET_THREAD.to_owned());
        let decoder = decoder
            .spawn_scoped(scope, || decode(file, field))
            .map_err(|error| QuantizeError::Threads { threads: 1, problem: error.to_string() })?;
        decoder
            .join()
            .unwrap_or_else(|_| Err(refusal(file, "it is damaged", "fetch it again or write it again")))
    })
}

fn decode(file: &Path, field: Option<&str>) -> Result<Vec<Located>, QuantizeError> {
    let broken = |what: &str, error: ParquetError| {
        let help =
            "fetch it again, or write it again without compression or compressed by snappy, gzip or zstd";
        refusal(file, format!("{what} cannot be read as Parquet: {error}"), help)
    };
    let opened = File::open(file).map_err(CheckpointError::io("open", file))?;
    let reader = SerializedFileReader::new(opened).map_err(|error| broken("it", error))?;
    let schema = reader.metadata().file_metadata().schema();
    let wanted = |name: &str| match field {
        Some(field) => name == field || name == "system",
        None => FIELDS.contains(&name),
    };
    let columns: Vec<_> =
        schema.get_fields().iter().filter(|column| wanted(column.name())).cloned().collect();
    if field.map_or(columns.is_empty(), |field| columns.iter().all(|column| column.name() != field)) {
        let names = quoted(schema.get_fields().iter().map(|column| column.name()));
        let missing =
            field.map_or("none of the known columns".to_owned(), |name| format!("no column {name:?}"));
        return Err(refusal(file, format!("it has {missing}, it has {names}"), HELP));
    }
    if let Some(column) = columns.iter().find(|column| !is_readable(column)) {
        let problem = format!("the column {:?} has a type against the rules of Parquet", column.name());
        return Err(refusal(file, problem, "write the file again"));
    }
    let projection = Type::group_type_builder(schema.name())
        .with_fields(columns)
        .build()
        .map_err(|error| broken("its schema", error))?;
    let mut values = Vec::new();
    for group in 0..reader.num_row_groups() {
        let in_group = format!("row group {}", group + 1);
        let rows = reader.get_row_group(group).map_err(|error| broken(&in_group, error))?;
        let rows = rows.get_row_iter(Some(projection.clone())).map_err(|error| broken(&in_group, error))?;
        for row in rows {
            let number = values.len() + 1;
            let row = row.map_err(|error| broken(&format!("row {number}"), error))?;
            values.push((Place::Row(number), object(&row)));
        }
    }
    Ok(values)
}

/// Whether the groups of a column are as the crate takes for granted: none is empty, lists and maps have one
/// repeated child.
fn is_readable(column: &Type) -> bool {
    let repetition = |field: &Type| {
        let info = field.get_basic_info();
        info.has_repetition().then(|| info.repetition())
    };
    if column.is_primitive() {
        return repetition(column).is_some();
    }
    let children = column.get_fields();
    let one_repeated = || match children {
        [child] => repetition(child) == Some(Repetition::REPEATED),
        _ => false,
    };
    let annotated_well = match column.get_basic_info().converted_type() {
        ConvertedType::LIST => one_repeated(),
        ConvertedType::MAP | ConvertedType::MAP_KEY_VALUE => {
            one_repeated() && children[0].is_group() && matches!(children[0].get_fields().len(), 1 | 2)
        }
        _ => true,
    };
    repetition(column).is_some()
        && !children.is_empty()
        && annotated_well
        && children.iter().all(|child| is_readable(child))
}

/// The fields that are not null.
fn object(row: &Row) -> Json {
    let present = row.get_column_iter().filter(|&(_, value)| *value != Field::Null);
    Json::Object(present.map(|(name, value)| (name.clone(), json(value))).collect())
}

fn json(value: &Field) -> Json {
    match value {
        // Some writers do not mark texts as such. Other bytes are no part of a document.
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).map_or(Json::Null, Json::from),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => Json::Array(list.elements().iter().map(json).collect()),
        other => other.to_json_value(),
    }
}
