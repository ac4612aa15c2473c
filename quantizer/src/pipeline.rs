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

mod matrix;
mod states;
mod streams;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::path::Path;

use nibble_kernels::backend::Backend;
use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_SHARD_BYTES, LinearWeight};
use nibble_model::forward::{DecoderLayer, Linear, LinearRole, LinearSpec, check_dense};

use self::matrix::{InputStatistics, quantize_matrix};
use self::streams::{LayerPair, LinearInput, Streams};
use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::output;
use crate::report::{MatrixReport, Report};
use crate::settings::{GptqSettings, Method, Settings};
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

    let correct = matches!(settings.method, Method::Gptq(GptqSettings { correction: true, .. }));
    let mut streams = match calibration {
        Some(calibration) => {
            let spill = out.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
            let limit = settings.memory_limit;
            Some(Streams::embed(backend, checkpoint, calibration, correct, limit, spill)?)
        }
        None => None,
    };
    let mut bits = 0.0;
    let mut weights = 0.0;
    let mut report = Vec::with_capacity(quantized.len());
    for index in 0..config.layers {
        let mut layer = match &streams {
            Some(streams) => Some(LayerPair {
                quantized: DecoderLayer::load(streams.backend(), checkpoint, index)?,
                original: match correct {
                    true => Some(DecoderLayer::load(streams.backend(), checkpoint, index)?),
                    false => None,
                },
            }),
            None => None,
        };
        for input in LinearInput::ALL {
            let statistics = match (&mut streams, &layer) {
                (Some(streams), Some(layer)) => {
                    let (hessian, drift) = streams.statistics(layer, input, &threads)?;
                    let name = input.roles()[0].spec(config, index).name;
                    InputStatistics::new(hessian, drift, settings, &name, &threads)?
                }
                _ => InputStatistics::Unknown,
            };
            for &role in input.roles() {
                let spec = role.spec(config, index);
                let (matrix, relative_error) =
                    quantize_matrix(checkpoint, &spec, settings, &statistics, &threads)?;
                quantization.write_linear(&mut writer, &spec.name, &matrix)?;
                let elements = (spec.out_features * spec.in_features) as f64;
                bits += matrix.bits_per_weight() * elements;
                weights += elements;
                report.push(MatrixReport {
                    name: spec.name.clone(),
                    bits: matrix.bits(),
                    group_size: matrix.group_size(),
                    relative_error,
                });
                progress(Progress {
                    matrices_done: report.len(),
                    matrices: quantized.len(),
                    matrix: &report[report.len() - 1],
                });
                if let (Some(streams), Some(layer)) = (&streams, &mut layer) {
                    layer.quantized.replace(role, pack(streams.backend(), checkpoint, &spec, matrix)?);
                }
            }
        }
        if let (Some(streams), Some(layer)) = (&mut streams, &layer) {
            streams.finish_layer(layer)?;
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
