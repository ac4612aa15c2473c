//! Writes a checkpoint directory that exists completely or not at all.
//!
//! Everything goes into `OUT.partial-XXXXXX` beside `OUT`; [`CheckpointWriter::finish`] flushes it to the disk
//! and renames it. A writer that is dropped before removes what it wrote. Tensors are streamed: the memory
//! used is that of the tensor being written.
//!
//! ```text
//! one shard:      model.safetensors
//! several shards: model-0000i-of-0000N.safetensors, and model.safetensors.index.json with
//!                 {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}
//! ```
//!
//! Refuses an `OUT` that exists, a tensor or file written twice, and bytes that disagree with the shape.

mod shard;

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, Permissions};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use self::shard::Shard;
use super::replace_file::sync_directory;
use crate::error::CheckpointError;

/// The shard size of Hugging Face's own writer: 5 GB.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Builds a checkpoint directory; see the module text.
pub struct CheckpointWriter {
    out: PathBuf,
    parent: PathBuf,
    partial: TempDir,
    max_shard_bytes: u64,
    open_shard: Option<Shard>,
    shards: usize,
    /// Which shard, counted from 0, holds a tensor.
    shard_of_tensor: BTreeMap<String, usize>,
    total_bytes: u64,
    files: HashSet<String>,
}

impl CheckpointWriter {
    /// Starts a directory that [`finish`](Self::finish) will name `out`. A shard ends before the tensor that
    /// would make it larger than `max_shard_bytes`; a tensor is never split, so one that is larger by itself
    /// gets a shard of its own.
    ///
    /// # Errors
    /// When `out` exists, or nothing can be created beside it.
    pub fn create(out: &Path, max_shard_bytes: u64) -> Result<Self, CheckpointError> {
        let parent = Self::check(out)?;
        Self::create_within(&parent, out, max_shard_bytes)
    }

    /// The same, but what is not finished yet stands in the directory `scratch`, on the same file system as `out`.
    ///
    /// # Errors
    /// When `out` exists, or nothing can be created in `scratch`.
    pub fn create_within(scratch: &Path, out: &Path, max_shard_bytes: u64) -> Result<Self, CheckpointError> {
        let parent = Self::check(out)?;
        let mut prefix = out.file_name().unwrap_or_default().to_owned();
        prefix.push(".partial-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        // A temporary directory is private by default; a checkpoint is an ordinary directory.
        #[cfg(unix)]
        builder.permissions(<Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o777));
        let partial =
            builder.tempdir_in(scratch).map_err(CheckpointError::io("create a directory in", scratch))?;
        Ok(Self {
            out: out.to_owned(),
            parent,
            partial,
            max_shard_bytes,
            open_shard: None,
            shards: 0,
            shard_of_tensor: BTreeMap::new(),
            total_bytes: 0,
            files: HashSet::new(),
        })
    }

    /// Checks that a directory `out` can be made, creates the one it will stand in, and returns that.
    ///
    /// # Errors
    /// When `out` exists, or the directory it would stand in cannot be created.
    pub fn check(out: &Path) -> Result<PathBuf, CheckpointError> {
        refuse_existing(out)?;
        if out.file_name().is_none() {
            return Err(CheckpointError::Mismatch {
                file: out.to_owned(),
                item: "output directory".to_owned(),
                found: format!("\"{}\"", out.display()),
                expected: "the name of a new directory".to_owned(),
                help: "name a directory that does not exist yet".to_owned(),
            });
        }
        let parent = match out.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        std::fs::create_dir_all(&parent).map_err(CheckpointError::io("create", &parent))?;
        Ok(parent)
    }

    /// The directory that will be there once the checkpoint is complete.
    pub fn path(&self) -> &Path {
        &self.out
    }

    /// Appends a tensor: `bytes` is row-major and little-endian.
    ///
    /// # Errors
    /// When the tensor was written before, when `bytes` is not `shape` x `dtype` long, or when the disk refuses.
    pub fn tensor(
        &mut self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CheckpointError> {
        let wrong = |found: String, expected: &str| {
            CheckpointError::tensor(
                &self.out,
                name,
                found,
                expected,
                "this is a bug in what writes the checkpoint",
            )
        };
        let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let expected =
            elements.and_then(|elements| elements.checked_mul(dtype.bitsize())).map(|bits| bits / 8);
        if expected != Some(bytes.len()) {
            let expected = format!("{dtype:?} {shape:?} ({expected:?} bytes)");
            return Err(wrong(format!("{} bytes", bytes.len()), &expected));
        }
        if self.shard_of_tensor.contains_key(name) {
            return Err(wrong("written twice".to_owned(), "written once"));
        }
        let size = bytes.len() as u64;
        if let Some(shard) = self.open_shard.take_if(|shard| shard.bytes() + size > self.max_shard_bytes) {
            shard.finish()?;
        }
        let shard = match &mut self.open_shard {
            Some(shard) => shard,
            None => {
                self.shards += 1;
                self.open_shard.insert(Shard::create(&self.partial_shard(self.shards - 1))?)
            }
        };
        shard.push(name, dtype, shape, bytes)?;
        self.shard_of_tensor.insert(name.to_owned(), self.shards - 1);
        self.total_bytes += size;
        Ok(())
    }

    /// Writes a file that is not a tensor, such as `config.json`.
    ///
    /// # Errors
    /// When `name` is not a plain file name, was written before, or when the disk refuses.
    pub fn file(&mut self, name: &str, contents: &[u8]) -> Result<(), CheckpointError> {
        let plain = Path::new(name).file_name().is_some_and(|file_name| file_name == name);
        if !plain || !self.files.insert(name.to_owned()) {
            return Err(CheckpointError::Mismatch {
                file: self.out.join(name),
                item: "file name".to_owned(),
                found: format!("\"{name}\""),
                expected: "a plain file name that was not written before".to_owned(),
                help: "this is a bug in what writes the checkpoint".to_owned(),
            });
        }
        let path = self.partial.path().join(name);
        let mut file = File::create_new(&path).map_err(CheckpointError::io("create", &path))?;
        file.write_all(contents).map_err(CheckpointError::io("write", &path))?;
        file.sync_all().map_err(CheckpointError::io("flush", &path))
    }

    /// Ends the last shard, names the shards, writes the index, flushes everything to the disk and gives the
    /// directory its name.
    ///
    /// # Errors
    /// When the disk refuses, or something was created at `out` meanwhile. Nothing is left behind then.
    pub fn finish(mut self) -> Result<(), CheckpointError> {
        if let Some(shard) = self.open_shard.take() {
            shard.finish()?;
        }
        for shard in 0..self.shards {
            let (from, to) = (self.partial_shard(shard), self.partial.path().join(self.shard_name(shard)));
            std::fs::rename(&from, &to).map_err(CheckpointError::io("rename", &from))?;
        }
        if self.shards > 1 {
            let weight_map: BTreeMap<&String, String> =
                self.shard_of_tensor.iter().map(|(name, &shard)| (name, self.shard_name(shard))).collect();
            let index = json!({ "metadata": { "total_size": self.total_bytes }, "weight_map": weight_map });
            self.file("model.safetensors.index.json", format!("{index:#}\n").as_bytes())?;
        }
        sync_directory(self.partial.path())?;
        refuse_existing(&self.out)?;
        // A rename onto a directory that appeared since then fails unless that directory is empty.
        std::fs::rename(self.partial.path(), &self.out).map_err(CheckpointError::io("create", &self.out))?;
        sync_directory(&self.parent)
    }

    fn partial_shard(&self, shard: usize) -> PathBuf {
        self.partial.path().join(format!("shard-{shard}.unnamed"))
    }

    fn shard_name(&self, shard: usize) -> String {
        match self.shards {
            1 => "model.safetensors".to_owned(),
            shards => format!("model-{:05}-of-{shards:05}.safetensors", shard + 1),
        }
    }
}

fn refuse_existing(out: &Path) -> Result<(), CheckpointError> {
    if std::fs::symlink_metadata(out).is_err() {
        return Ok(());
    }
    Err(CheckpointError::Mismatch {
        file: out.to_owned(),
        item: "output directory".to_owned(),
        found: "there already".to_owned(),
        expected: "a directory that does not exist yet".to_owned(),
        help: "remove it or name another one".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn one_shard_is_named_model_safetensors_and_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let mut writer = CheckpointWriter::create(&out, DEFAULT_SHARD_BYTES).unwrap();
        writer.tensor("half", Dtype::F16, &[3], &[1, 2, 3, 4, 5, 6]).unwrap();
        writer.tensor("integers", Dtype::I32, &[1, 2], &[7, 0, 0, 0, 8, 0, 0, 0]).unwrap();
        writer.file("config.json", b"{}").unwrap();
        assert!(!out.exists());
        writer.finish().unwrap();
        assert_eq!(names(directory.path()), ["out"]);
        assert_eq!(names(&out), ["config.json", "model.safetensors"]);
        let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let half = tensors.tensor("half").unwrap();
        assert_eq!(
            (half.dtype(), half.shape(), half.data()),
            (Dtype::F16, &[3][..], &[1, 2, 3, 4, 5, 6][..])
        );
        let integers = tensors.tensor("integers").unwrap();
        assert_eq!(integers.data(), [7, 0, 0, 0, 8, 0, 0, 0]);
        let offset = integers.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert_eq!(offset % 4, 0, "a wide tensor is aligned although a narrow one of odd length came first");
    }

    #[test]
    fn shards_are_cut_at_the_limit_and_indexed() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let mut writer = CheckpointWriter::create(&out, 8).unwrap();
        for (name, bytes) in [("c", 4), ("b", 4), ("large", 20), ("a", 8)] {
            writer.tensor(name, Dtype::U8, &[bytes], &vec![bytes as u8; bytes]).unwrap();
        }
        writer.finish().unwrap();
        let index = std::fs::read(out.join("model.safetensors.index.json")).unwrap();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 36);
        let file = |shard: usize| format!("model-{shard:05}-of-00003.safetensors");
        for (name, shard, bytes) in [("c", 1, 4), ("b", 1, 4), ("large", 2, 20), ("a", 3, 8)] {
            assert_eq!(index["weight_map"][name], file(shard));
            let data = std::fs::read(out.join(file(shard))).unwrap();
            let tensors = SafeTensors::deserialize(&data).unwrap();
            assert_eq!(tensors.tensor(name).unwrap().data(), vec![bytes as u8; bytes]);
        }
    }

    #[test]
    fn a_writer_that_is_dropped_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = CheckpointWriter::create(&directory.path().join("out"), 4).unwrap();
        writer.tensor("a", Dtype::U8, &[4], &[0; 4]).unwrap();
        writer.tensor("b", Dtype::U8, &[4], &[0; 4]).unwrap();
        drop(writer);
        assert!(names(directory.path()).is_empty());
    }

    #[test]
    fn an_existing_output_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let writer = CheckpointWriter::create(&out, 4).unwrap();
        std::fs::write(&out, "precious").unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("there already"));
        assert!(CheckpointWriter::create(&out, 4).is_err());
        assert_eq!(std::fs::read(&out).unwrap(), b"precious");
        assert_eq!(names(directory.path()), ["out"]);
    }

    #[test]
    fn wrong_sizes_and_repeated_names_are_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = CheckpointWriter::create(&directory.path().join("out"), 4).unwrap();
        let error = writer.tensor("short", Dtype::F32, &[2], &[0; 4]).unwrap_err().to_string();
        assert!(error.contains("\"short\"") && error.contains("4 bytes"), "{error}");
        assert!(writer.tensor("huge", Dtype::F32, &[usize::MAX, 2], &[]).is_err());
        writer.tensor("twice", Dtype::U8, &[1], &[0]).unwrap();
        assert!(writer.tensor("twice", Dtype::U8, &[1], &[0]).is_err());
        writer.file("config.json", b"{}").unwrap();
        assert!(writer.file("config.json", b"{}").is_err());
        assert!(writer.file("../config.json", b"{}").is_err());
    }
}
