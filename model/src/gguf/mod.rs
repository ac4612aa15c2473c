//! GGUF, the model file of llama.cpp: metadata, a table of tensors, and tensors of quantized blocks.
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | metadata entries u64
//! metadata entry: key string | type u32 | value        string: bytes u64 | UTF-8
//! tensor:         name string | dimensions u32 | size u64 each, fastest first | type u32 | offset u64
//! padding to general.alignment (32 when absent)
//! data: each tensor at its offset, a multiple of the alignment
//! ```
//!
//! All little-endian; versions 2 and 3, which differ in nothing that is read here. The file is mapped; a
//! tensor's bytes are touched when they are asked for. Nothing is trusted: counts are compared with the bytes
//! that are left before anything is allocated, sizes are multiplied checked, and tensors must lie inside the
//! file, aligned and apart.
//!
//! Refused by name: version 1, big-endian files, arrays of arrays, files of several parts, and element types
//! that [`BlockType`] does not have (only when such a tensor is decoded: it may be one nobody needs).
//!
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod blocks;
mod element_type;
mod metadata;
mod parser;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use blocks::{BlockGroups, BlockType};
pub use element_type::{ElementType, UndecodedType};
pub use metadata::{MetadataArray, MetadataValue};

use crate::error::CheckpointError;
use crate::mapped_file::MappedFile;

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: MappedFile,
    metadata: BTreeMap<String, MetadataValue>,
    tensors: BTreeMap<String, Entry>,
}

/// Where a tensor lies in the file.
#[derive(Debug)]
struct Entry {
    element_type: ElementType,
    /// Slowest first, as everywhere in Nibble; the file has them the other way round.
    shape: Vec<usize>,
    bytes: Range<usize>,
}

/// A tensor of a GGUF file.
#[derive(Clone, Copy, Debug)]
pub struct GgufTensor<'a> {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: &'a str,
    /// How its elements are stored.
    pub element_type: ElementType,
    /// Its shape, slowest dimension first.
    pub shape: &'a [usize],
    /// Its blocks, row by row. Empty when the type is unknown, and so its size.
    pub data: &'a [u8],
}

impl GgufFile {
    /// Maps the file at `path`, reads its metadata and checks its table of tensors.
    ///
    /// # Errors
    /// Names what is cut off, malformed or not supported.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let map = MappedFile::open(path)?;
        let parsed = parser::parse(path, &map)?;
        Ok(Self { path: path.to_owned(), map, metadata: parsed.metadata, tensors: parsed.tensors })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata of `key`, if present.
    pub fn metadata(&self, key: &str) -> Option<&MetadataValue> {
        self.metadata.get(key)
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = GgufTensor<'_>> {
        self.tensors.iter().map(|(name, entry)| self.view(name, entry))
    }

    /// The tensor `name`, if present.
    pub fn tensor(&self, name: &str) -> Option<GgufTensor<'_>> {
        self.tensors.get_key_value(name).map(|(name, entry)| self.view(name, entry))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> GgufTensor<'a> {
        GgufTensor {
            name,
            element_type: entry.element_type,
            shape: &entry.shape,
            data: &self.map[entry.bytes.clone()],
        }
    }
}

impl GgufTensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The type of its blocks.
    ///
    /// # Errors
    /// When it is one that cannot be decoded; `file` is for the message.
    pub fn block_type(&self, file: &Path) -> Result<BlockType, CheckpointError> {
        match self.element_type {
            ElementType::Block(block) => Ok(block),
            other => Err(CheckpointError::Unsupported {
                file: file.to_owned(),
                item: format!("tensor \"{}\"", self.name),
                found: format!("of element type {other}"),
                supported: BlockType::ALL.map(BlockType::name).join(", "),
            }),
        }
    }
}
