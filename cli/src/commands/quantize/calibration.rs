//! The calibration data.

use std::path::Path;

use nibble_model::checkpoint::Checkpoint;
use nibble_model::tokenizer::Tokenizer;
use nibble_quantizer::calibration::CalibrationOptions;
use nibble_quantizer::{Calibration, Settings};

use super::arguments::QuantizeArguments;
use crate::device::load;
use crate::output::Progress;

/// The calibration sequences of the text `source`, or written by the model itself.
pub(super) fn calibrate(
    arguments: &QuantizeArguments,
    checkpoint: &Checkpoint,
    settings: &Settings,
    source: &Path,
) -> anyhow::Result<Calibration> {
    let QuantizeArguments { samples, sequence_length, seed, .. } = *arguments;
    let options = CalibrationOptions { samples, sequence_length, seed };
    let tokenizer = Tokenizer::open(checkpoint.directory(), checkpoint.config())?;
    if source != Path::new("self") {
        return Ok(Calibration::from_text(source, &tokenizer, checkpoint.config(), options)?);
    }
    settings.check(checkpoint.config())?;
    let mut model = load(checkpoint, &arguments.device, sequence_length)?;
    let mut bar = Progress::new("writing the calibration text");
    Ok(Calibration::from_model(&mut model, &tokenizer, options, &mut |tokens, wanted| {
        bar.update(tokens as u64, wanted as u64, "tokens");
    })?)
}
