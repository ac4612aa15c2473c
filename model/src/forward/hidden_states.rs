//! One vector for every token of several sequences, such as their residual streams: in memory, or in a file when
//! there are too many.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use safetensors::Dtype;

use crate::checkpoint::{CheckpointWriter, TensorFiles};
use crate::error::CheckpointError;

/// Where vectors go that are too many for memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spill {
    /// Bytes that are held in memory; when all vectors take more, they go to a file.
    pub memory_bytes: u64,
    /// Where the file lies. It has no name and goes with the process.
    pub directory: PathBuf,
}

/// Vectors of `width` elements for the tokens of several sequences, a sequence at a time.
pub struct HiddenStates {
    width: usize,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    store: Store,
}

enum Store {
    Memory(Vec<Vec<f32>>),
    /// An unnamed file in `directory`, the sequences one after the other: gone when the process ends.
    File {
        file: File,
        directory: PathBuf,
    },
}

impl HiddenStates {
    /// Zeros for sequences of these `lengths` in tokens.
    ///
    /// # Errors
    /// When a file is needed and cannot be made.
    pub fn new(lengths: &[usize], width: usize, spill: &Spill) -> Result<Self, CheckpointError> {
        let bytes = (lengths.iter().sum::<usize>() * width * size_of::<f32>()) as u64;
        let store = if bytes <= spill.memory_bytes {
            Store::Memory(lengths.iter().map(|tokens| vec![0.0; tokens * width]).collect())
        } else {
            let directory = spill.directory.clone();
            let file = tempfile::tempfile_in(&directory)
                .and_then(|file| file.set_len(bytes).map(|()| file))
                .map_err(CheckpointError::io("create a file for hidden states in", &directory))?;
            Store::File { file, directory }
        };
        Ok(Self { width, lengths: lengths.to_vec(), store })
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// Copies the vectors of sequence `index` to `values`, `[tokens, width]`.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(&self, index: usize, values: &mut Vec<f32>) -> Result<(), CheckpointError> {
        match &self.store {
            Store::Memory(sequences) => values.clone_from(&sequences[index]),
            Store::File { file, directory } => {
                values.resize(self.lengths[index] * self.width, 0.0);
                let mut file = file;
                file.seek(SeekFrom::Start(self.offset(index)))
                    .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(values)))
                    .map_err(CheckpointError::io("read hidden states from a file in", directory))?;
            }
        }
        Ok(())
    }

    /// Replaces the vectors of sequence `index`.
    ///
    /// # Errors
    /// When the file cannot be written: the disk is full.
    pub fn write(&mut self, index: usize, values: &[f32]) -> Result<(), CheckpointError> {
        debug_assert_eq!(values.len(), self.lengths[index] * self.width);
        let offset = self.offset(index);
        match &mut self.store {
            Store::Memory(sequences) => sequences[index].copy_from_slice(values),
            Store::File { file, directory } => {
                file.seek(SeekFrom::Start(offset))
                    .and_then(|_| file.write_all(bytemuck::cast_slice(values)))
                    .map_err(CheckpointError::io("write hidden states to a file in", directory))?;
            }
        }
        Ok(())
    }

    /// Writes every sequence as a tensor of its own, called after `name`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, writer: &mut CheckpointWriter, name: &str) -> Result<(), CheckpointError> {
        let mut values = Vec::new();
        for (index, &tokens) in self.lengths.iter().enumerate() {
            self.read(index, &mut values)?;
            let bytes = bytemuck::cast_slice(&values);
            writer.tensor(&format!("{name}.{index}"), Dtype::F32, &[tokens, self.width], bytes)?;
        }
        Ok(())
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// When a sequence is missing or of another length.
    pub fn restore(&mut self, files: &TensorFiles, name: &str) -> Result<(), CheckpointError> {
        for index in 0..self.lengths.len() {
            let tensor = files.raw(&format!("{name}.{index}"))?;
            let expected = [self.lengths[index], self.width];
            if tensor.shape != expected || tensor.dtype != Dtype::F32 {
                let found = format!("{:?} {:?}", tensor.dtype, tensor.shape);
                let help = "the file was written for other sequences; remove it and what belongs to it";
                let expected = format!("F32 {expected:?}");
                return Err(CheckpointError::tensor(tensor.file, tensor.name, found, expected, help));
            }
            let values: Vec<f32> =
                tensor.data.chunks_exact(size_of::<f32>()).map(bytemuck::pod_read_unaligned).collect();
            self.write(index, &values)?;
        }
        Ok(())
    }

    /// Where the vectors of sequence `index` begin in the file, in bytes.
    fn offset(&self, index: usize) -> u64 {
        (self.lengths[..index].iter().sum::<usize>() * self.width * size_of::<f32>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_holds_what_memory_holds() {
        let directory = tempfile::tempdir().unwrap();
        let lengths = [3, 1, 2];
        for memory_bytes in [u64::MAX, 95] {
            let spill = Spill { memory_bytes, directory: directory.path().to_owned() };
            let mut states = HiddenStates::new(&lengths, 4, &spill).unwrap();
            let values = |index: usize| -> Vec<f32> {
                (0..lengths[index] * 4).map(|element| (index * 100 + element) as f32).collect()
            };
            let mut read = Vec::new();
            states.read(1, &mut read).unwrap();
            assert_eq!(read, [0.0; 4]);
            for index in [2, 0, 1] {
                states.write(index, &values(index)).unwrap();
            }
            for index in [1, 2, 0] {
                states.read(index, &mut read).unwrap();
                assert_eq!(read, values(index));
            }
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
