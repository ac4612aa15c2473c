//! One safetensors file, written as a stream: tensors arrive one by one, none is kept in memory.
//!
//! ```text
//! file = header_bytes: u64 little-endian | header: JSON, padded with spaces to 8 bytes | data
//! ```
//!
//! The header comes first in the file but is known last, so the data is first spooled to a file beside and
//! copied behind the header when the shard ends (one shard of extra disk, no extra memory). The copy also
//! orders the tensors by falling element size, so that each of them is aligned in the mapped file whatever
//! the order they arrived in; the reference implementation's `serialize` does the same.
//!
//! Source: <https://github.com/huggingface/safetensors#format>.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::CheckpointError;

/// Where a tensor lies in the spool.
struct Spooled {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

/// A safetensors file in the making.
pub(super) struct Shard {
    path: PathBuf,
    spool_path: PathBuf,
    spool: BufWriter<File>,
    tensors: Vec<Spooled>,
    bytes: u64,
}

impl Shard {
    /// Starts the file that will be at `path`.
    pub(super) fn create(path: &Path) -> Result<Self, CheckpointError> {
        let spool_path = path.with_extension("spool");
        let spool = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&spool_path)
            .map_err(CheckpointError::io("create", &spool_path))?;
        Ok(Self {
            path: path.to_owned(),
            spool_path,
            spool: BufWriter::with_capacity(1 << 20, spool),
            tensors: Vec::new(),
            bytes: 0,
        })
    }

    /// Bytes of tensor data so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends a tensor whose size was checked against its shape.
    pub(super) fn push(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        self.spool.write_all(bytes).map_err(CheckpointError::io("write", &self.spool_path))?;
        self.tensors.push(Spooled {
            name: name.to_owned(),
            dtype,
            shape: shape.to_vec(),
            offset: self.bytes,
            bytes: bytes.len(),
        });
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Writes header and data, and waits until they are on the disk.
    pub(super) fn finish(self) -> Result<(), CheckpointError> {
        let Self { path, spool_path, spool, mut tensors, .. } = self;
        let mut spool = spool
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)
            .map_err(CheckpointError::io("write", &spool_path))?;
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.bitsize()));
        let mut file = File::create_new(&path).map_err(CheckpointError::io("create", &path))?;
        file.write_all(&header(&path, &tensors)?).map_err(CheckpointError::io("write", &path))?;
        for tensor in &tensors {
            spool
                .seek(SeekFrom::Start(tensor.offset))
                .map_err(CheckpointError::io("seek in", &spool_path))?;
            let mut data = (&mut spool).take(tensor.bytes as u64);
            std::io::copy(&mut data, &mut file).map_err(CheckpointError::io("write", &path))?;
        }
        file.sync_all().map_err(CheckpointError::io("flush", &path))?;
        std::fs::remove_file(&spool_path).map_err(CheckpointError::io("remove", &spool_path))
    }
}

/// The length and the JSON header of a file that holds `tensors` in this order.
fn header(path: &Path, tensors: &[Spooled]) -> Result<Vec<u8>, CheckpointError> {
    let mut start = 0;
    let infos = tensors.iter().map(|tensor| {
        let data_offsets = (start, start + tensor.bytes);
        start = data_offsets.1;
        let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets };
        (tensor.name.clone(), info)
    });
    // transformers refuses files that do not say which framework's tensor layout they hold.
    let framework = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let refused = |problem: String| CheckpointError::malformed(path, problem, "this is a bug, report it");
    let metadata =
        Metadata::new(Some(framework), infos.collect()).map_err(|error| refused(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| refused(error.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}
