//! A file as a read-only byte slice, mapped and not read.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::error::CheckpointError;

/// The bytes of a file.
#[derive(Debug)]
pub(crate) struct MappedFile(Mmap);

impl MappedFile {
    /// Maps the file at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::io("open", path))?;
        // SAFETY: the map is read-only and owned by the value that lends it out. Another process that
        // truncates the file meanwhile would end this one with SIGBUS; model files are not written in place.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("map", path))?;
        Ok(Self(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
