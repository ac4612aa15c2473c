//! The safetensors files of a directory, one or several with an index.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::shard::{Entry, Shard};
use super::{INDEX_FILE, SINGLE_FILE, TensorInfo};
use crate::error::CheckpointError;

/// The tensors of a directory, memory-mapped.
pub struct TensorFiles {
    directory: PathBuf,
    shards: Vec<Shard>,
    /// Shard of each tensor.
    tensors: BTreeMap<String, usize>,
}

impl TensorFiles {
    /// Reads the header of every weight file of `directory`.
    ///
    /// # Errors
    /// Names the file that is missing or damaged, and a tensor that is in two files.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let index = directory.join(INDEX_FILE);
        let single = directory.join(SINGLE_FILE);
        let paths = if index.exists() && !single.exists() { indexed_files(&index)? } else { vec![single] };
        let shards = paths.iter().map(|path| Shard::open(path)).collect::<Result<Vec<_>, _>>()?;
        let mut tensors = BTreeMap::new();
        for (number, shard) in shards.iter().enumerate() {
            for name in shard.entries.keys() {
                if let Some(other) = tensors.insert(name.clone(), number) {
                    let other = format!("also in {}", shards[other].path.display());
                    return Err(CheckpointError::tensor(
                        &shard.path,
                        name,
                        other,
                        "in one file only",
                        "write the checkpoint again",
                    ));
                }
            }
        }
        Ok(Self { directory: directory.to_owned(), shards, tensors })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorInfo<'_>> {
        self.tensors.iter().map(|(name, &shard)| {
            let shard = &self.shards[shard];
            info(name, shard, &shard.entries[name])
        })
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor `name` as the file holds it.
    ///
    /// # Errors
    /// When there is none.
    pub fn raw(&self, name: &str) -> Result<TensorInfo<'_>, CheckpointError> {
        let Some((name, &shard)) = self.tensors.get_key_value(name) else {
            let file = if self.shards.len() == 1 {
                self.shards[0].path.clone()
            } else {
                self.directory.join(INDEX_FILE)
            };
            let help = "the checkpoint is incomplete or of another architecture than config.json says";
            return Err(CheckpointError::tensor(&file, name, "missing", "present", help));
        };
        let shard = &self.shards[shard];
        Ok(info(name, shard, &shard.entries[name]))
    }
}

fn info<'a>(name: &'a str, shard: &'a Shard, entry: &'a Entry) -> TensorInfo<'a> {
    let (dtype, shape) = (entry.dtype, entry.shape.as_slice());
    TensorInfo { name, dtype, shape, data: shard.bytes(entry), file: &shard.path }
}

/// The files an index names, in its directory.
pub(crate) fn indexed_files(index: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let text = std::fs::read_to_string(index).map_err(CheckpointError::io("read", index))?;
    let help = "fetch or write the checkpoint again";
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|error| CheckpointError::malformed(index, error, help))?;
    let Some(map) = json.get("weight_map").and_then(serde_json::Value::as_object) else {
        return Err(CheckpointError::field(index, "weight_map", "missing", "an object of tensor to file"));
    };
    let directory = index.parent().unwrap_or(Path::new("."));
    let mut files: Vec<&str> = Vec::new();
    for (tensor, file) in map {
        let plain =
            file.as_str().filter(|file| Path::new(file).file_name().is_some_and(|name| name == *file));
        let Some(file) = plain else {
            return Err(CheckpointError::field(index, tensor, file, "the name of a file in this directory"));
        };
        files.push(file);
    }
    files.sort_unstable();
    files.dedup();
    Ok(files.into_iter().map(|file| directory.join(file)).collect())
}
