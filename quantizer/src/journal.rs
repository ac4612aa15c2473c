//! What is left of a run that was killed, and how the next one goes on with it.
//!
//! Beside the output `OUT` stands `OUT.resume` while a run works:
//!
//! ```text
//! journal.json   what the run was about: another model, other settings or other calibration data are refused
//! sensitivities.json   how much each unit matters and what it gets, where bits are spent
//! logits.json   what the quantized model computes, when all of it is finished
//! layer-00007/   the tensors of decoder layer 7 as they will be written, and report.json
//! states-00007/  the calibration states behind layer 7
//! ```
//!
//! The output head, where it is quantized, is one more layer behind the last.
//!
//! Every directory is written beside, flushed and renamed, so it is there completely or not at all. Layers are
//! finished up to the newest states; what lies beyond is removed and done again. States are written when some time
//! has passed since the last ones: a run that is killed loses that time and the layer it was at. Because states
//! are stored bit by bit, the run that goes on writes the bytes that an uninterrupted one would have written.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nibble_model::checkpoint::{
    Checkpoint, CheckpointWriter, DEFAULT_SHARD_BYTES, TensorFiles, replace_file,
};
use nibble_model::error::CheckpointError;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::report::{MatrixReport, RunLogits, UnitSensitivity};
use crate::settings::Settings;

const JOURNAL: &str = "journal.json";
const REPORT: &str = "report.json";
const SENSITIVITIES: &str = "sensitivities.json";
const LOGITS: &str = "logits.json";
/// Bytes at the start and at the end of each tensor that tell one model from another.
const SAMPLE: usize = 4096;

/// The directory `OUT.resume`.
pub(crate) struct Journal {
    directory: PathBuf,
    finished: usize,
    interval: Duration,
    saved: Instant,
}

/// What a run is about, for people to read where it differs.
pub(crate) fn identity(
    checkpoint: &Checkpoint,
    settings: &Settings,
    calibration: Option<&Calibration>,
) -> Value {
    let mut model = DefaultHasher::new();
    for tensor in checkpoint.tensors() {
        (tensor.name, format!("{:?}", tensor.dtype), tensor.shape).hash(&mut model);
        let data = tensor.data;
        data[..data.len().min(SAMPLE)].hash(&mut model);
        data[data.len().saturating_sub(SAMPLE)..].hash(&mut model);
    }
    let mut sequences = DefaultHasher::new();
    calibration.map(Calibration::sequences).hash(&mut sequences);
    json!({
        "nibble": env!("CARGO_PKG_VERSION"),
        "model": format!("{:016x}", model.finish()),
        "settings": Settings { threads: 0, ..settings.clone() },
        "calibration data": format!("{:016x}", sequences.finish()),
    })
}

impl Journal {
    /// Starts `OUT.resume`, or goes on with it where `resume` says so.
    ///
    /// # Errors
    /// When it is there and `resume` is not given, when it is about another run, and when the disk refuses.
    pub(crate) fn open(
        out: &Path,
        identity: &Value,
        resume: bool,
        interval: Duration,
    ) -> Result<Self, QuantizeError> {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(".resume");
        let directory = out.with_file_name(name);
        let path = directory.join(JOURNAL);
        let mut journal = Self { directory, finished: 0, interval, saved: Instant::now() };
        let refuse = |found: String, help: &str| {
            let (directory, help) = (journal.directory.clone(), help.to_owned());
            Err(QuantizeError::Journal { directory, found, help })
        };
        if !path.exists() {
            fs::create_dir_all(&journal.directory)
                .map_err(CheckpointError::io("create", &journal.directory))?;
            replace_file(&journal.directory, JOURNAL, format!("{identity:#}\n").as_bytes())?;
            return Ok(journal);
        }
        if !resume {
            let help = "give --resume to go on with it, or remove it to start again";
            return refuse("was left by a run that did not finish".to_owned(), help);
        }
        let text = fs::read(&path).map_err(CheckpointError::io("read", &path))?;
        let help = "remove the directory to start again";
        let stored: Value =
            serde_json::from_slice(&text).map_err(|error| CheckpointError::malformed(&path, error, help))?;
        for (key, value) in identity.as_object().into_iter().flatten() {
            if stored.get(key) != Some(value) {
                let found = format!("is about another run: {key} was {}, is {value}", stored[key]);
                return refuse(found, "give the arguments of that run, or remove the directory");
            }
        }
        journal.finished = journal.count_finished()?;
        journal.remove_unfinished()?;
        Ok(journal)
    }

    /// Layers that need not be done again.
    pub(crate) fn finished(&self) -> usize {
        self.finished
    }

    /// Where the journal lies.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// A writer for the tensors of layer `index`.
    pub(crate) fn layer_writer(&self, index: usize) -> Result<CheckpointWriter, CheckpointError> {
        CheckpointWriter::create(&self.layer_directory(index), DEFAULT_SHARD_BYTES)
    }

    /// Ends the layer of `writer`, and whether it is time to [save states](Self::save_states) behind it.
    pub(crate) fn finish_layer(
        &self,
        mut writer: CheckpointWriter,
        reports: &[MatrixReport],
    ) -> Result<bool, CheckpointError> {
        writer.file(REPORT, format!("{:#}\n", json!(reports)).as_bytes())?;
        writer.finish()?;
        Ok(self.saved.elapsed() >= self.interval)
    }

    /// Saves the states behind layer `index`, which is finished then, by `write`.
    pub(crate) fn save_states(
        &mut self,
        index: usize,
        write: impl FnOnce(&mut CheckpointWriter) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let mut writer = CheckpointWriter::create(&self.states_directory(index), DEFAULT_SHARD_BYTES)?;
        write(&mut writer)?;
        writer.finish()?;
        self.finished = index + 1;
        self.saved = Instant::now();
        self.remove_unfinished()
    }

    /// The states behind the last finished layer.
    pub(crate) fn states(&self) -> Result<Option<TensorFiles>, CheckpointError> {
        match self.finished.checked_sub(1) {
            Some(index) => TensorFiles::open(&self.states_directory(index)).map(Some),
            None => Ok(None),
        }
    }

    /// The tensors of layer `index`.
    pub(crate) fn layer(&self, index: usize) -> Result<TensorFiles, CheckpointError> {
        TensorFiles::open(&self.layer_directory(index))
    }

    /// What was reported about layer `index`.
    pub(crate) fn reports(&self, index: usize) -> Result<Vec<MatrixReport>, CheckpointError> {
        read_json(&self.layer_directory(index).join(REPORT))
    }

    /// What [`save_sensitivities`](Self::save_sensitivities) saved.
    pub(crate) fn sensitivities(&self) -> Result<Option<Vec<UnitSensitivity>>, CheckpointError> {
        let path = self.directory.join(SENSITIVITIES);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Keeps what was found before the first layer.
    pub(crate) fn save_sensitivities(&self, units: &[UnitSensitivity]) -> Result<(), CheckpointError> {
        replace_file(&self.directory, SENSITIVITIES, format!("{:#}\n", json!(units)).as_bytes())
    }

    /// What [`save_logits`](Self::save_logits) saved.
    pub(crate) fn logits(&self) -> Result<Option<RunLogits>, CheckpointError> {
        let path = self.directory.join(LOGITS);
        if path.exists() { read_json(&path).map(Some) } else { Ok(None) }
    }

    /// Keeps what the quantized model computed, before the states behind its last layer are.
    pub(crate) fn save_logits(&self, logits: &RunLogits) -> Result<(), CheckpointError> {
        replace_file(&self.directory, LOGITS, format!("{:#}\n", json!(logits)).as_bytes())
    }

    /// Removes the journal: the output is there, or nothing is worth going on with.
    pub(crate) fn remove(self) -> Result<(), CheckpointError> {
        fs::remove_dir_all(&self.directory).map_err(CheckpointError::io("remove", &self.directory))
    }

    fn layer_directory(&self, index: usize) -> PathBuf {
        self.directory.join(format!("layer-{index:05}"))
    }

    fn states_directory(&self, index: usize) -> PathBuf {
        self.directory.join(format!("states-{index:05}"))
    }

    /// One more than the last layer with states, all before it being there.
    fn count_finished(&self) -> Result<usize, CheckpointError> {
        let mut finished = 0;
        for index in 0.. {
            if !self.layer_directory(index).is_dir() {
                break;
            }
            if self.states_directory(index).is_dir() {
                finished = index + 1;
            }
        }
        Ok(finished)
    }

    /// Removes whatever is not a finished layer or its states.
    fn remove_unfinished(&self) -> Result<(), CheckpointError> {
        let directory = &self.directory;
        let error = || CheckpointError::io("read", directory);
        let kept = |path: &Path| {
            path.ends_with(JOURNAL)
                || path.ends_with(SENSITIVITIES)
                || path.ends_with(LOGITS)
                || (0..self.finished).any(|index| path == self.layer_directory(index))
                || self.finished.checked_sub(1).is_some_and(|last| path == self.states_directory(last))
        };
        for entry in fs::read_dir(directory).map_err(error())? {
            let path = entry.map_err(error())?.path();
            if !kept(&path) {
                let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(CheckpointError::io("remove", &path))?;
            }
        }
        Ok(())
    }
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    let text = fs::read(path).map_err(CheckpointError::io("read", path))?;
    let help = "remove the directory of the journal to start again";
    serde_json::from_slice(&text).map_err(|error| CheckpointError::malformed(path, error, help))
}
