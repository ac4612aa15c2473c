//! The header of a GGUF file: bytes to metadata and table of tensors, with nothing trusted.

use std::collections::BTreeMap;
use std::path::Path;

use super::{ElementType, Entry, MetadataArray, MetadataValue};
use crate::error::CheckpointError;

const MAGIC: &[u8; 4] = b"GGUF";
const DEFAULT_ALIGNMENT: usize = 32;
const MAX_DIMENSIONS: u32 = 4; // GGML_MAX_DIMS
/// The least bytes of a metadata entry: empty key, type, one byte.
const LEAST_ENTRY_BYTES: usize = 8 + 4 + 1;
/// The least bytes of a tensor's table entry: empty name, one dimension, type, offset.
const LEAST_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// The header of a file.
pub(super) struct Parsed {
    pub(super) metadata: BTreeMap<String, MetadataValue>,
    pub(super) tensors: BTreeMap<String, Entry>,
}

/// Parses the header of `bytes`, the whole of the file `path`.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Parsed, CheckpointError> {
    let mut reader = Reader { path, bytes, position: 0 };
    if bytes.get(..4) != Some(MAGIC) {
        return Err(CheckpointError::malformed(
            path,
            "not a GGUF file: it does not begin with \"GGUF\"",
            "name the .gguf file of a model",
        ));
    }
    reader.position = MAGIC.len();
    check_version(path, reader.u32("the version")?)?;
    let tensor_count = reader.count("the number of tensors", LEAST_TENSOR_BYTES)?;
    let entry_count = reader.count("the number of metadata entries", LEAST_ENTRY_BYTES)?;
    let mut metadata = BTreeMap::new();
    for index in 0..entry_count {
        let key = reader.string(&format!("the key of metadata entry {index}"))?;
        let value = reader.value(&key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.malformed(format!("metadata \"{key}\" is there twice")));
        }
    }
    let mut table = BTreeMap::new();
    for index in 0..tensor_count {
        let name = reader.string(&format!("the name of tensor {index}"))?;
        let row = reader.table_row(&name)?;
        if table.insert(name.clone(), row).is_some() {
            return Err(reader.malformed(format!("tensor \"{name}\" is there twice")));
        }
    }
    let alignment = alignment(&reader, &metadata)?;
    let data_start = reader.position.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    let tensors = table
        .into_iter()
        .map(|(name, row)| {
            let entry = reader.place(&name, row, data_start, alignment)?;
            Ok((name, entry))
        })
        .collect::<Result<BTreeMap<_, _>, CheckpointError>>()?;
    refuse_overlap(&reader, &tensors)?;
    Ok(Parsed { metadata, tensors })
}

fn check_version(path: &Path, version: u32) -> Result<(), CheckpointError> {
    if matches!(version, 2 | 3) {
        return Ok(());
    }
    let found = match version.swap_bytes() {
        swapped @ 1..=3 => format!("{swapped}, big-endian"),
        _ => version.to_string(),
    };
    Err(CheckpointError::Unsupported {
        file: path.to_owned(),
        item: "GGUF version".to_owned(),
        found,
        supported: "2 and 3, little-endian".to_owned(),
    })
}

fn alignment(
    reader: &Reader<'_>,
    metadata: &BTreeMap<String, MetadataValue>,
) -> Result<usize, CheckpointError> {
    const KEY: &str = "general.alignment";
    match metadata.get(KEY) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(MetadataValue::Unsigned(value)) => usize::try_from(*value)
            .ok()
            .filter(|alignment| alignment.is_power_of_two())
            .ok_or_else(|| reader.malformed(format!("metadata \"{KEY}\" is {value}, not a power of two"))),
        Some(_) => Err(reader.malformed(format!("metadata \"{KEY}\" is not an unsigned integer"))),
    }
}

fn refuse_overlap(reader: &Reader<'_>, tensors: &BTreeMap<String, Entry>) -> Result<(), CheckpointError> {
    let mut by_place: Vec<_> = tensors.iter().filter(|(_, entry)| !entry.bytes.is_empty()).collect();
    by_place.sort_by_key(|(_, entry)| entry.bytes.start);
    match by_place.windows(2).find(|pair| pair[0].1.bytes.end > pair[1].1.bytes.start) {
        None => Ok(()),
        Some(pair) => {
            let (first, second) = (pair[0].0, pair[1].0);
            Err(reader.malformed(format!("tensors \"{first}\" and \"{second}\" overlap")))
        }
    }
}

/// A tensor's entry in the table, not yet compared with the file.
struct TableRow {
    shape: Vec<usize>,
    element_type: ElementType,
    offset: u64,
}

/// A position in the file.
struct Reader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn malformed(&self, problem: impl ToString) -> CheckpointError {
        CheckpointError::malformed(self.path, problem, "the file is damaged or cut off: fetch it again")
    }

    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8], CheckpointError> {
        let end = self.position.checked_add(length);
        let Some(bytes) = end.and_then(|end| self.bytes.get(self.position..end)) else {
            let total = self.bytes.len();
            return Err(self.malformed(format!("the file ends after {total} bytes, inside {what}")));
        };
        self.position += length;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], CheckpointError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32, CheckpointError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, CheckpointError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of items of at least `least_bytes` bytes each: no more than the rest of the file can hold.
    fn count(&mut self, what: &str, least_bytes: usize) -> Result<usize, CheckpointError> {
        let count = self.u64(what)?;
        let most = (self.bytes.len() - self.position) / least_bytes;
        usize::try_from(count).ok().filter(|&count| count <= most).ok_or_else(|| {
            self.malformed(format!("{what} is {count}, but the rest of the file has room for {most} only"))
        })
    }

    fn string(&mut self, what: &str) -> Result<String, CheckpointError> {
        let length = self.count(&format!("the length of {what}"), 1)?;
        let bytes = self.take(length, what)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.malformed(format!("{what} is not UTF-8: {error}"))),
        }
    }

    fn value(&mut self, key: &str) -> Result<MetadataValue, CheckpointError> {
        let what = format!("metadata \"{key}\"");
        match self.u32(&what)? {
            ARRAY => self.array_value(key, &what).map(MetadataValue::Array),
            kind => self.scalar(kind, &what),
        }
    }

    fn scalar(&mut self, kind: u32, what: &str) -> Result<MetadataValue, CheckpointError> {
        Ok(match kind {
            U8 | U16 | U32 | U64 => MetadataValue::Unsigned(self.unsigned(kind, what)?),
            I8 | I16 | I32 | I64 => MetadataValue::Signed(self.signed(kind, what)?),
            F32 | F64 => MetadataValue::Float(self.float(kind, what)?),
            BOOL => MetadataValue::Bool(self.bool(what)?),
            STRING => MetadataValue::String(self.string(what)?),
            other => return Err(self.malformed(format!("{what} is of the unknown type {other}"))),
        })
    }

    fn unsigned(&mut self, kind: u32, what: &str) -> Result<u64, CheckpointError> {
        Ok(match kind {
            U8 => u8::from_le_bytes(self.array(what)?).into(),
            U16 => u16::from_le_bytes(self.array(what)?).into(),
            U32 => u32::from_le_bytes(self.array(what)?).into(),
            _ => u64::from_le_bytes(self.array(what)?),
        })
    }

    fn signed(&mut self, kind: u32, what: &str) -> Result<i64, CheckpointError> {
        Ok(match kind {
            I8 => i8::from_le_bytes(self.array(what)?).into(),
            I16 => i16::from_le_bytes(self.array(what)?).into(),
            I32 => i32::from_le_bytes(self.array(what)?).into(),
            _ => i64::from_le_bytes(self.array(what)?),
        })
    }

    fn float(&mut self, kind: u32, what: &str) -> Result<f64, CheckpointError> {
        Ok(match kind {
            F32 => f32::from_le_bytes(self.array(what)?).into(),
            _ => f64::from_le_bytes(self.array(what)?),
        })
    }

    fn bool(&mut self, what: &str) -> Result<bool, CheckpointError> {
        match self.array::<1>(what)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.malformed(format!("{what} is {other}, expected 0 or 1"))),
        }
    }

    fn array_value(&mut self, key: &str, what: &str) -> Result<MetadataArray, CheckpointError> {
        let kind = self.u32(what)?;
        let least_bytes = match kind {
            U8 | I8 | BOOL => 1,
            U16 | I16 => 2,
            U32 | I32 | F32 => 4,
            U64 | I64 | F64 | STRING => 8,
            ARRAY => return Err(self.malformed(format!("{what} is an array of arrays"))),
            other => {
                return Err(self.malformed(format!("{what} is an array of the unknown type {other}")));
            }
        };
        let count = self.count(&format!("the length of {what}"), least_bytes)?;
        let item = format!("an item of metadata \"{key}\"");
        Ok(match kind {
            I8 | I16 | I32 | I64 => {
                MetadataArray::Signed((0..count).map(|_| self.signed(kind, &item)).collect::<Result<_, _>>()?)
            }
            F32 | F64 => {
                MetadataArray::Float((0..count).map(|_| self.float(kind, &item)).collect::<Result<_, _>>()?)
            }
            BOOL => MetadataArray::Bool((0..count).map(|_| self.bool(&item)).collect::<Result<_, _>>()?),
            STRING => {
                MetadataArray::String((0..count).map(|_| self.string(&item)).collect::<Result<_, _>>()?)
            }
            _ => MetadataArray::Unsigned(
                (0..count).map(|_| self.unsigned(kind, &item)).collect::<Result<_, _>>()?,
            ),
        })
    }

    fn table_row(&mut self, name: &str) -> Result<TableRow, CheckpointError> {
        let what = format!("the table entry of tensor \"{name}\"");
        let dimensions = self.u32(&what)?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            let problem =
                format!("tensor \"{name}\" has {dimensions} dimensions, expected one to {MAX_DIMENSIONS}");
            return Err(self.malformed(problem));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&what)?;
            shape.push(usize::try_from(size).map_err(|_| {
                self.malformed(format!("tensor \"{name}\" has a dimension of {size} elements"))
            })?);
        }
        shape.reverse();
        let element_type = ElementType::from_number(self.u32(&what)?);
        Ok(TableRow { shape, element_type, offset: self.u64(&what)? })
    }

    /// The bytes of a tensor in the file, checked.
    fn place(
        &self,
        name: &str,
        row: TableRow,
        data_start: usize,
        alignment: usize,
    ) -> Result<Entry, CheckpointError> {
        let TableRow { shape, element_type, offset } = row;
        let wrong = |problem: String| self.malformed(format!("tensor \"{name}\" {problem}"));
        let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let Some(elements) = elements else {
            return Err(wrong(format!("has the impossible shape {shape:?}")));
        };
        let length = match element_type.block() {
            Some((block_elements, block_bytes)) => {
                let row = shape.last().copied().unwrap_or(0);
                if row % block_elements != 0 {
                    return Err(wrong(format!(
                        "has rows of {row} elements, not a multiple of {block_elements} for {element_type}"
                    )));
                }
                (elements / block_elements).checked_mul(block_bytes)
            }
            None => Some(0),
        };
        if offset % alignment as u64 != 0 {
            return Err(wrong(format!(
                "lies at offset {offset}, not a multiple of the alignment {alignment}"
            )));
        }
        let start = usize::try_from(offset).ok().and_then(|offset| data_start.checked_add(offset));
        let range = start.and_then(|start| Some(start..start.checked_add(length?)?));
        match range {
            Some(bytes) if bytes.end <= self.bytes.len() => Ok(Entry { element_type, shape, bytes }),
            _ => {
                let total = self.bytes.len();
                Err(wrong(format!(
                    "of type {element_type} and shape {shape:?} at offset {offset} does not end within the \
                     {total} bytes of the file"
                )))
            }
        }
    }
}

// The numbers of `gguf_type`.
const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;
