//! Calibration data: token sequences that show the quantizer what the inputs of each layer look like.
//!
//! It comes from files, as many as there are, or from the model itself ([`Calibration::from_model`]).
//!
//! **A text** is tokenized whole and cut into stretches of one sequence each that do not overlap; each begins with
//! the tokens that the model's tokenizer puts before a text (a beginning-of-sequence token, or none).
//!
//! **JSONL, JSON and Parquet** hold documents: texts, tokenized as the tokenizer does it, and conversations, in the
//! form of the model's chat template. Whole documents share a sequence while there is room, so that every sequence
//! is nearly full and none is cut without need; as in pretraining, a document attends to those before it.
//! llm-compressor and GPTQModel give each document a sequence of its own by default: of short ones the same number
//! of samples is then a fraction of the tokens, and what a long one has beyond the sequence is lost even where data
//! is scarce.
//!
//! A seed shuffles the stretches and documents of all files together; they are taken in this order until there are
//! as many sequences as were asked for, and these come in the order of the files. Only documents that are drawn are
//! rendered and tokenized.

mod document;
mod files;
mod generated;
mod packing;
mod parquet_rows;
mod skipped;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use nibble_model::chat_template::ChatTemplate;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::config::ModelConfig;
use nibble_model::tokenizer::Tokenizer;

pub use self::parquet_rows::PARQUET_THREAD;

use self::document::{Document, render};
use self::files::{Contents, Place, read};
use self::packing::{Packer, shuffled};
use self::skipped::Skipped;
use crate::error::QuantizeError;

/// How many sequences, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    /// Sequences to draw.
    pub samples: usize,
    /// Tokens of a sequence; of one that holds documents the most.
    pub sequence_length: usize,
    /// Which sequences are drawn.
    pub seed: u64,
}

impl CalibrationOptions {
    /// Checks that there are sequences of at least `shortest` tokens, and at most `longest`.
    fn check(self, shortest: usize, longest: usize) -> Result<(), QuantizeError> {
        if self.samples > 0 && (shortest..=longest).contains(&self.sequence_length) {
            return Ok(());
        }
        Err(QuantizeError::Settings {
            name: "calibration".to_owned(),
            found: format!("{} sequences of {} tokens", self.samples, self.sequence_length),
            expected: format!("at least 1 sequence of {shortest} to {longest} tokens"),
            help: "change --samples or --sequence-length".to_owned(),
        })
    }
}

/// Token sequences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Calibration {
    sequences: Vec<Vec<u32>>,
    sequence_length: usize,
}

/// What can be drawn.
struct Sample {
    file: usize,
    /// `None` for a stretch of a text.
    place: Option<Place>,
    content: Content,
}

enum Content {
    /// The tokens of a sequence.
    Stretch(Vec<u32>),
    Document(Document),
}

impl Calibration {
    /// Draws sequences for the model `checkpoint` from `files`, with documents in `field` where one is named. Warns
    /// of samples that are skipped, and of too few sequences or tokens.
    ///
    /// # Errors
    /// When the model cannot take sequences of that length, a file cannot be read or is not what its ending says,
    /// none of its documents can be used, or the model's tokenizer or chat template is broken.
    pub fn from_files(
        files: &[PathBuf],
        field: Option<&str>,
        checkpoint: &Checkpoint,
        options: CalibrationOptions,
    ) -> Result<Self, QuantizeError> {
        let config = checkpoint.config();
        let tokenizer = checkpoint.tokenizer()?;
        let prefix = tokenizer.encode("", true)?;
        let length = options.sequence_length;
        options.check(prefix.len() + 1, config.max_position_embeddings)?;
        let mut skipped = Skipped::default();
        let samples = read_samples(files, field, &tokenizer, &prefix, length, &mut skipped)?;
        let is_chat = |sample: &Sample| matches!(sample.content, Content::Document(Document::Chat(_)));
        let template = match samples.iter().any(is_chat) {
            true => checkpoint.chat_template()?,
            false => None,
        };
        let mut packer = Packer::new(&prefix, length, options.samples);
        for number in shuffled(samples.len(), options.seed) {
            let sample = &samples[number];
            match tokens(&sample.content, &tokenizer, template.as_ref())? {
                Ok(tokens) => {
                    if !packer.add(number, tokens) {
                        break;
                    }
                }
                Err(reason) => skipped.add(&files[sample.file], sample.place, reason),
            }
        }
        let sequences = packer.finish();
        if sequences.is_empty() {
            let help = "give other data, or a smaller --sequence-length for short texts";
            return Err(QuantizeError::NoSamples { skipped: skipped.to_string(), help });
        }
        if skipped.count() > 0 {
            tracing::warn!("{} calibration samples are skipped: {skipped}", skipped.count());
        }
        warn_of_too_little(&sequences, options, config);
        Ok(Self { sequences, sequence_length: length })
    }

    /// The first `count` sequences.
    pub(crate) fn first(&self, count: usize) -> Self {
        let sequences = self.sequences.iter().take(count).cloned().collect();
        Self { sequences, ..self.clone() }
    }

    /// The sequences.
    pub fn sequences(&self) -> &[Vec<u32>] {
        &self.sequences
    }

    /// The most tokens of a sequence. Those of texts and of the model itself all have as many, those of documents
    /// at most.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }
}

/// All samples of `files`, in their order.
fn read_samples(
    files: &[PathBuf],
    field: Option<&str>,
    tokenizer: &Tokenizer,
    prefix: &[u32],
    length: usize,
    skipped: &mut Skipped,
) -> Result<Vec<Sample>, QuantizeError> {
    let mut samples = Vec::new();
    for (file, path) in files.iter().enumerate() {
        match read(path, field, skipped)? {
            Contents::Text(text) => {
                let tokens = tokenizer.encode(&text, false)?;
                let stretches = tokens.chunks_exact(length - prefix.len());
                if stretches.len() == 0 {
                    let reason = format!("{} tokens, fewer than one sequence of {length}", tokens.len());
                    skipped.add(path, None, reason);
                }
                samples.extend(stretches.map(|stretch| {
                    let content = Content::Stretch([prefix, stretch].concat());
                    Sample { file, place: None, content }
                }));
            }
            Contents::Documents(documents) => {
                samples.extend(documents.into_iter().map(|(place, document)| {
                    let content = Content::Document(document);
                    Sample { file, place: Some(place), content }
                }));
            }
        }
    }
    Ok(samples)
}

/// The tokens of a sample, or why it has none.
fn tokens(
    content: &Content,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
) -> Result<Result<Vec<u32>, String>, QuantizeError> {
    let tokens = match content {
        Content::Stretch(tokens) => tokens.clone(),
        Content::Document(Document::Text(text)) => tokenizer.encode(text, true)?,
        Content::Document(Document::Chat(messages)) => match render(messages, template) {
            // A template prints the special tokens itself.
            Ok(text) => tokenizer.encode(&text, template.is_none())?,
            Err(reason) => return Ok(Err(reason)),
        },
    };
    Ok(if tokens.is_empty() { Err("empty".to_owned()) } else { Ok(tokens) })
}

fn warn_of_too_little(sequences: &[Vec<u32>], options: CalibrationOptions, config: &ModelConfig) {
    if sequences.len() < options.samples {
        tracing::warn!(
            wanted = options.samples,
            found = sequences.len(),
            "the calibration data holds fewer sequences than asked for; all of them are used"
        );
    }
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    let widest = config.intermediate_size.max(config.hidden_size).max(config.heads * config.head_dim);
    if tokens < widest {
        tracing::warn!(
            tokens,
            inputs = widest,
            "fewer calibration tokens than inputs of the widest matrix; give more samples for a better result"
        );
    }
}
