//! nibble_self_test.json: what a checkpoint's weights and logits were when it was written.
//!
//! ```text
//! weights    a checksum of each quantized linear layer's dequantized weights, and of each other tensor's bytes
//! tokens     a short prompt
//! logits     of its last token, for some tokens of the vocabulary, with activations as they are
//! rounded_logits   the same by a device that rounds activations to eight bits
//! tolerance  how far a device's logits may be from those of its kind
//! ```
//!
//! Checksums find a damaged file and a reader that reads it wrong; logits find a device that computes wrong.

mod checksum;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use nibble_kernels::backend::{Activations, Backend};
use serde::{Deserialize, Serialize};

pub use self::checksum::Checksum;
use crate::checkpoint::{Checkpoint, LinearWeight, replace_file};
use crate::config::ModelConfig;
use crate::error::CheckpointError;
use crate::forward::{BLOCK_SIZE, Batch, LinearRole, LinearSpec, Model, ModelError, streamed_logits};

/// The name of the file in a checkpoint directory.
pub const SELF_TEST_FILE: &str = "nibble_self_test.json";

/// Tokens of the prompt.
const PROMPT_TOKENS: usize = 12;
/// Logits that are stored.
const GOLDEN_LOGITS: usize = 16;
/// Allowed difference of a logit, as a part of the standard deviation of all logits: devices that compute in 16 bits
/// stay well below, a wrong layer does not.
const TOLERANCE_OF_DEVIATION: f64 = 0.05;

/// What nibble_self_test.json holds; see the module text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SelfTest {
    /// Checksums by linear layer or tensor.
    pub weights: BTreeMap<String, Checksum>,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Logits of the prompt's last token, with [`Activations::Float`].
    pub logits: Vec<GoldenLogit>,
    /// The same tokens' logits with [`Activations::Integer`]; empty in a file of a version that had only the others.
    #[serde(default)]
    pub rounded_logits: Vec<GoldenLogit>,
    /// How far a logit may be off.
    pub tolerance: f32,
}

/// The logit of one token of the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct GoldenLogit {
    /// The token.
    pub token: u32,
    /// Its logit.
    pub logit: f32,
}

impl SelfTest {
    /// Reads every weight of `checkpoint` and runs the prompt through it, one decoder layer in memory at a time, on a
    /// `device` with either kind of activations.
    ///
    /// # Errors
    /// When a tensor is missing or malformed, or a logit is not finite.
    pub fn record<B: Backend>(
        device: impl Fn(Activations) -> B,
        checkpoint: &Checkpoint,
    ) -> Result<Self, ModelError> {
        let config = checkpoint.config();
        let tokens = prompt(config);
        let weights = checksums(checkpoint)?;
        let logits = streamed_logits(device(Activations::Float), checkpoint, &tokens)?;
        let rounded = streamed_logits(device(Activations::Integer), checkpoint, &tokens)?;
        let (last, rounded) = (logits.row(logits.rows - 1), rounded.row(rounded.rows - 1));
        let count = last.len() as f64;
        let mean = last.iter().map(|&logit| f64::from(logit)).sum::<f64>() / count;
        let variance = last.iter().map(|&logit| (f64::from(logit) - mean).powi(2)).sum::<f64>() / count;
        if !variance.is_finite() || !rounded.iter().all(|logit| logit.is_finite()) {
            let (found, expected) = ("not finite", "finite numbers");
            let help = "the original model or the quantized weights overflow; quantize with other settings";
            return Err(mismatch(checkpoint.path(), "the logits of the self-test", found, expected, help));
        }
        let (logits, rounded_logits) = (golden(last), golden(rounded));
        let tolerance = (TOLERANCE_OF_DEVIATION * variance.sqrt()) as f32;
        Ok(Self { weights, tokens, logits, rounded_logits, tolerance })
    }

    /// Writes the file into `directory`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn write(&self, directory: &Path) -> Result<(), CheckpointError> {
        let path = directory.join(SELF_TEST_FILE);
        let text = serde_json::to_string_pretty(self)
            .map_err(|error| CheckpointError::malformed(&path, error, "this is a bug in the self-test"))?;
        replace_file(directory, SELF_TEST_FILE, (text + "\n").as_bytes())
    }

    /// Reads the file of `directory`.
    ///
    /// # Errors
    /// When it is missing or malformed.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let path = directory.join(SELF_TEST_FILE);
        if !path.is_file() {
            let found = "missing".to_owned();
            let expected = "the file that `nibble quantize` writes last".to_owned();
            let help =
                "this checkpoint has no self-test: do without it, or quantize the model again".to_owned();
            return Err(CheckpointError::Mismatch {
                file: path,
                item: "the self-test".to_owned(),
                found,
                expected,
                help,
            });
        }
        let text = std::fs::read(&path).map_err(CheckpointError::io("read", &path))?;
        let help = "fetch the checkpoint or quantize the model again";
        let test: Self =
            serde_json::from_slice(&text).map_err(|error| CheckpointError::malformed(&path, error, help))?;
        if test.tokens.is_empty() || test.logits.is_empty() || test.tolerance.is_nan() {
            return Err(CheckpointError::malformed(&path, "it has no prompt, logits or tolerance", help));
        }
        Ok(test)
    }

    /// Checks every weight of `checkpoint`.
    ///
    /// # Errors
    /// Names the first linear layer or tensor that is damaged, missing or new.
    pub fn check_weights(&self, checkpoint: &Checkpoint) -> Result<(), CheckpointError> {
        let found = checksums(checkpoint)?;
        let names: std::collections::BTreeSet<&String> = self.weights.keys().chain(found.keys()).collect();
        for name in names {
            let (found, expected) = (found.get(name), self.weights.get(name));
            if found != expected {
                let say = |checksum: Option<&Checksum>| match checksum {
                    Some(checksum) => format!("there with the checksum {checksum}"),
                    None => "missing".to_owned(),
                };
                let help = "the weights are damaged or not those of this self-test; fetch or quantize again";
                let directory = checkpoint.path();
                return Err(CheckpointError::tensor(directory, name, say(found), say(expected), help));
            }
        }
        Ok(())
    }

    /// Checks the logits of a loaded model, whose checkpoint lies in `directory`; returns the largest difference.
    ///
    /// # Errors
    /// When a logit is further off than the tolerance, or the model refuses the prompt.
    pub fn check_model<B: Backend>(&self, model: &mut Model<B>, directory: &Path) -> Result<f32, ModelError> {
        let blocks = self.tokens.len().div_ceil(BLOCK_SIZE);
        let mut cache = model.kv_cache(blocks)?;
        let mut batch = Batch::single(&self.tokens, 0, (0..blocks as u32).collect());
        batch.logit_rows = vec![self.tokens.len() - 1];
        let logits = model.forward(&batch, &mut cache)?;
        self.check_logits(logits.row(0), model.backend().activations(), directory)
    }

    /// Checks the logits of a checkpoint with one decoder layer in memory at a time; returns the largest difference.
    ///
    /// # Errors
    /// When a logit is further off than the tolerance, or a tensor is missing or malformed.
    pub fn check_streamed<B: Backend>(&self, backend: B, checkpoint: &Checkpoint) -> Result<f32, ModelError> {
        let activations = backend.activations();
        let logits = streamed_logits(backend, checkpoint, &self.tokens)?;
        self.check_logits(logits.row(logits.rows - 1), activations, checkpoint.path())
    }

    fn check_logits(
        &self,
        logits: &[f32],
        activations: Activations,
        directory: &Path,
    ) -> Result<f32, ModelError> {
        let expected = match activations {
            Activations::Float => &self.logits,
            Activations::Integer => &self.rounded_logits,
        };
        if expected.is_empty() {
            let item = "field \"rounded_logits\" of the self-test";
            let expected = "logits by a device that rounds activations to eight bits";
            let help =
                "an earlier version wrote it: test with `--activations f32`, or quantize the model again";
            return Err(mismatch(&directory.join(SELF_TEST_FILE), item, "missing", expected, help));
        }
        let mut largest: f32 = 0.0;
        for golden in expected {
            let item = format!("the logit of token {} in the self-test", golden.token);
            let help = "the device computes wrong, or the weights are not those of this self-test";
            let Some(&logit) = logits.get(golden.token as usize) else {
                let expected = format!("a token below {}", logits.len());
                return Err(mismatch(&directory.join(SELF_TEST_FILE), &item, "there", &expected, help));
            };
            let difference = (logit - golden.logit).abs();
            if difference.is_nan() || difference > self.tolerance {
                let expected = format!("{} with a tolerance of {}", golden.logit, self.tolerance);
                return Err(mismatch(directory, &item, &logit.to_string(), &expected, help));
            }
            largest = largest.max(difference);
        }
        Ok(largest)
    }
}

fn mismatch(file: &Path, item: &str, found: &str, expected: &str, help: &str) -> ModelError {
    let (item, found) = (item.to_owned(), found.to_owned());
    let (expected, help) = (expected.to_owned(), help.to_owned());
    CheckpointError::Mismatch { file: file.to_owned(), item, found, expected, help }.into()
}

/// Some of a token's logits, evenly spaced over the vocabulary.
fn golden(logits: &[f32]) -> Vec<GoldenLogit> {
    let chosen = GOLDEN_LOGITS.min(logits.len());
    let logit = |token: usize| GoldenLogit { token: token as u32, logit: logits[token] };
    (0..chosen).map(|index| logit(index * logits.len() / chosen)).collect()
}

/// Tokens from all of the vocabulary, in no order.
fn prompt(config: &ModelConfig) -> Vec<u32> {
    let vocabulary = config.vocabulary_size as u64;
    let count = PROMPT_TOKENS.min(config.max_position_embeddings.max(1)) as u64;
    // Knuth's multiplicative hash: consecutive numbers land far apart.
    (1..=count).map(|index| (index * 2_654_435_761 % vocabulary) as u32).collect()
}

/// The checksum of every quantized linear layer, and of every tensor that is not part of one.
fn checksums(checkpoint: &Checkpoint) -> Result<BTreeMap<String, Checksum>, CheckpointError> {
    let config = checkpoint.config();
    let layers = (0..config.layers).flat_map(|layer| LinearRole::ALL.map(|role| role.spec(config, layer)));
    let head = (!config.tie_word_embeddings).then(|| LinearSpec::output_head(config));
    let parts = config.quantization.as_ref().map_or(&[][..], |quantization| quantization.parts());
    let mut checksums = BTreeMap::new();
    let mut parts_of_layers = HashSet::new();
    for LinearSpec { name, out_features, in_features, .. } in layers.chain(head) {
        if let LinearWeight::Quantized(matrix) = checkpoint.linear(&name, out_features, in_features)? {
            parts_of_layers.extend(parts.iter().map(|part| format!("{name}.{part}")));
            checksums.insert(name, Checksum::of(&matrix));
        }
    }
    for tensor in checkpoint.tensors().filter(|tensor| !parts_of_layers.contains(tensor.name)) {
        checksums.insert(tensor.name.to_owned(), Checksum::of_bytes(tensor.data));
    }
    Ok(checksums)
}
