//! One safetensors file, memory-mapped: a header of names, element types, shapes and offsets, then bytes.
//!
//! The header is checked by the `safetensors` crate when the file is opened: offsets must be contiguous, fit
//! the shape and the element type, and end where the file ends, so a truncated file never gets further.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use crate::error::CheckpointError;
use crate::mapped_file::MappedFile;

/// Where a tensor lies in its file.
pub(super) struct Entry {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Range<usize>,
}

/// A mapped file and its parsed header.
pub(super) struct Shard {
    pub(super) path: PathBuf,
    map: MappedFile,
    pub(super) entries: BTreeMap<String, Entry>,
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let map = MappedFile::open(path)?;
        let malformed = |problem: String| {
            CheckpointError::malformed(
                path,
                problem,
                "the file is damaged or cut off: fetch or write it again",
            )
        };
        let (header_bytes, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| malformed(format!("not a valid safetensors header: {error}")))?;
        let data_start = header_bytes + size_of::<u64>();
        let data_bytes = map.len() - data_start;
        if metadata.data_len() != data_bytes {
            let expected = metadata.data_len();
            return Err(malformed(format!("holds {data_bytes} bytes of tensors, expected {expected}")));
        }
        let entries = metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (start, end) = info.data_offsets;
                let bytes = data_start + start..data_start + end;
                (name, Entry { dtype: info.dtype, shape: info.shape.clone(), bytes })
            })
            .collect();
        Ok(Self { path: path.to_owned(), map, entries })
    }

    pub(super) fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.map[entry.bytes.clone()]
    }
}
