//! Through the model, one decoder layer at a time.
//!
//! ```text
//! hidden = embedding of the calibration tokens
//! for each decoder layer:
//!     for each input of linear layers (query/key/value, attention output, gate/up, down):
//!         run the layer up to there, with what is quantized already     -> Hessian of the input
//!         quantize the linear layers that multiply it, write them, put them into the layer
//!     hidden = the quantized layer's output
//! ```
//!
//! Every matrix is quantized for the inputs it will get, those of the quantized layers before it. Held in memory:
//! the layer's weights, one Hessian with its factorization, two hidden states for each calibration token.

mod activations;
mod matrix;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::Path;

use nibble_kernels::backend::Backend;
use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_SHARD_BYTES, LinearWeight};
use nibble_model::forward::{DecoderLayer, Linear, LinearRole, LinearSpec, check_dense};

use self::activations::{Activations, LinearInput};
use self::matrix::{InputStatistics, quantize_matrix};
use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::output;
use crate::report::{MatrixReport, Report};
use crate::settings::{Method, Settings};
use crate::threads::Threads;

/// How far quantization has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Matrices quantized.
    pub matrices_done: usize,
    /// Matrices in all.
    pub matrices: usize,
    /// The last one.
    pub matrix: &'a MatrixReport,
}

/// Quantizes `checkpoint` into the new directory `out`, running calibration on `backend`.
///
/// Without `calibration`, [`Method::RoundToNearest`] only looks at the weights.
///
/// # Errors
/// When the settings do not fit the model, GPTQ has no calibration data, a file is wrong, numbers are not
/// finite, or `out` exists or cannot be written. Nothing is left at `out` then.
pub fn quantize<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    out: &Path,
    settings: &Settings,
    calibration: Option<&Calibration>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report, QuantizeError> {
    let config = checkpoint.config();
    settings.check(config)?;
    check_dense(checkpoint)?;
    if calibration.is_none() && matches!(settings.method, Method::Gptq(_)) {
        return Err(QuantizeError::Settings {
            name: "--calibration".to_owned(),
            found: "missing".to_owned(),
            expected: "a text file, which GPTQ needs".to_owned(),
            help: "name one, or use --method rtn".to_owned(),
        });
    }
    let threads = Threads::new(settings.threads)?;
    let mut writer = CheckpointWriter::create(out, DEFAULT_SHARD_BYTES)?;
    let specs = || (0..config.layers).flat_map(|layer| LinearRole::ALL.map(|role| role.spec(config, layer)));
    let quantized: HashSet<String> = specs().map(|spec| format!("{}.weight", spec.name)).collect();
    let quantization = settings.quantization_config()?;
    output::write_files(checkpoint, &mut writer, &quantization)?;
    output::copy_tensors(checkpoint, &mut writer, &quantized)?;

    let mut activations = match calibration {
        Some(calibration) => Some(Activations::embed(backend, checkpoint, calibration)?),
        None => None,
    };
    let mut bits = 0.0;
    let mut weights = 0.0;
    let mut report = Vec::with_capacity(quantized.len());
    for index in 0..config.layers {
        let mut layer = match &activations {
            Some(activations) => Some(DecoderLayer::load(activations.backend(), checkpoint, index)?),
            None => None,
        };
        for input in LinearInput::ALL {
            let statistics = match (&mut activations, &layer) {
                (Some(activations), Some(layer)) => {
                    let hessian = activations.hessian(layer, input, &threads)?;
                    let name = input.roles()[0].spec(config, index).name;
                    InputStatistics::new(hessian, settings, &name, &threads)?
                }
                _ => InputStatistics::Unknown,
            };
            for &role in input.roles() {
                let spec = role.spec(config, index);
                let (matrix, measured) = quantize_matrix(checkpoint, &spec, settings, &statistics, &threads)?;
                quantization.write_linear(&mut writer, &spec.name, &matrix)?;
                bits += measured.bits_per_weight * measured.weights as f64;
                weights += measured.weights as f64;
                report.push(measured);
                progress(Progress {
                    matrices_done: report.len(),
                    matrices: quantized.len(),
                    matrix: &report[report.len() - 1],
                });
                if let (Some(activations), Some(layer)) = (&activations, &mut layer) {
                    layer.replace(role, pack(activations.backend(), checkpoint, &spec, matrix)?);
                }
            }
        }
        if let (Some(activations), Some(layer)) = (&mut activations, &layer) {
            activations.finish_layer(layer)?;
        }
    }
    writer.finish()?;
    Ok(Report {
        bits_per_weight: bits / weights,
        errors_are_of_outputs: calibration.is_some(),
        layers: report,
    })
}

/// The linear layer in device form, with the bias of the checkpoint.
fn pack<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    spec: &LinearSpec,
    matrix: QuantizedMatrix,
) -> Result<Linear<B>, QuantizeError> {
    let bias = match spec.bias {
        true => Some(checkpoint.vector(&format!("{}.bias", spec.name), spec.out_features)?),
        false => None,
    };
    Linear::pack(backend, &spec.name, &LinearWeight::Quantized(matrix), bias.as_deref())
        .map_err(QuantizeError::matrix(&spec.name))
}
