//! The calibration options of `nibble quantize`.

use std::path::{Path, PathBuf};

use anyhow::ensure;
use clap::Args;
use nibble_model::checkpoint::Checkpoint;
use nibble_quantizer::calibration::{CalibrationOptions, PARQUET_THREAD};
use nibble_quantizer::{Calibration, Settings};

use crate::device::{DeviceArguments, load};
use crate::output::Progress;

/// What is calibrated on.
#[derive(Debug, Args)]
pub(super) struct CalibrationArguments {
    /// A file to calibrate on; give the option again for more files. Endings .jsonl and .json: a document in each
    /// line, or a JSON array of them; .parquet: a document in each row; anything else: a UTF-8 text. A document is
    /// a text or an object with text, messages, conversations, prompt and completion, or instruction and output;
    /// conversations go through the model's chat template. The word self: a text that the model writes, which
    /// needs the whole model in memory. rtn only measures its error with it, the other methods need it.
    #[arg(long, value_name = "FILE|self", required_if_eq_any([("method", "awq"), ("method", "gptq"), ("method", "awq-gptq")]))]
    pub(super) calibration: Vec<PathBuf>,
    /// The field or column that holds the text or the messages of a document.
    #[arg(long, value_name = "NAME")]
    calibration_field: Option<String>,
    /// Calibration sequences to draw.
    #[arg(long, value_name = "N", default_value_t = 128)]
    samples: usize,
    /// Tokens of a calibration sequence. Documents share one while there is room, and are cut at its end.
    #[arg(long, value_name = "N", default_value_t = 512)]
    sequence_length: usize,
    /// Which calibration sequences are drawn.
    #[arg(long, default_value_t = 0)]
    pub(super) seed: u64,
}

impl CalibrationArguments {
    /// The calibration sequences of the files, or written by the model itself; `None` when none are wanted.
    pub(super) fn read(
        &self,
        checkpoint: &Checkpoint,
        settings: &Settings,
        device: &DeviceArguments,
    ) -> anyhow::Result<Option<Calibration>> {
        let Self { samples, sequence_length, seed, .. } = *self;
        let options = CalibrationOptions { samples, sequence_length, seed };
        let field = self.calibration_field.as_deref();
        if self.calibration.is_empty() {
            ensure!(field.is_none(), "--calibration-field is given and there is no --calibration file");
            return Ok(None);
        }
        settings.check(checkpoint.config())?;
        if self.calibration.iter().all(|file| file != Path::new("self")) {
            leave_panics_to_errors();
            return Ok(Some(Calibration::from_files(&self.calibration, field, checkpoint, options)?));
        }
        ensure!(
            self.calibration.len() == 1 && field.is_none(),
            "--calibration self cannot be combined with files or --calibration-field; \
             give either, or ./self for a file of that name"
        );
        let tokenizer = checkpoint.tokenizer()?;
        let mut model = load(checkpoint, device.cpu(), sequence_length)?;
        let mut bar = Progress::new("writing the calibration text");
        Ok(Some(Calibration::from_model(&mut model, &tokenizer, options, &mut |tokens, wanted| {
            bar.update(tokens as u64, wanted as u64, "tokens");
        })?))
    }
}

/// Lets panics of the Parquet decoder go unsaid: the quantizer makes errors of them, which are said.
fn leave_panics_to_errors() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() != Some(PARQUET_THREAD) {
            say(panic);
        }
    }));
}
