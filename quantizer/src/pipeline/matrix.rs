//! One weight matrix: its codes, and how far they are off.

use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::forward::LinearSpec;

use crate::error::QuantizeError;
use crate::grid::Grid;
use crate::hessian::Hessian;
use crate::methods::gptq::InverseFactor;
use crate::methods::refine::{Target, refine};
use crate::methods::{Weights, assemble, gptq, rtn};
use crate::report::{MatrixReport, measure};
use crate::settings::{GptqSettings, Method, Settings};
use crate::threads::Threads;

/// What is known about an input of linear layers.
pub(super) enum InputStatistics {
    /// No calibration data.
    Unknown,
    /// Enough to measure an output error.
    Measured(Hessian),
    /// Enough for GPTQ.
    Factored { hessian: Hessian, factor: InverseFactor, settings: GptqSettings },
}

impl InputStatistics {
    /// What `settings.method` needs to know; `name` is the first linear layer that multiplies the input.
    pub(super) fn new(
        hessian: Hessian,
        settings: &Settings,
        name: &str,
        threads: &Threads,
    ) -> Result<Self, QuantizeError> {
        if let Some(input) = (0..hessian.inputs()).find(|&input| !hessian.diagonal(input).is_finite()) {
            return Err(QuantizeError::NotFinite {
                name: name.to_owned(),
                what: "the calibration activations",
                found: format!("of input {input} overflow"),
                help: "the checkpoint is damaged or does not fit its config.json",
            });
        }
        let Method::Gptq(settings) = settings.method else { return Ok(Self::Measured(hessian)) };
        let factor = threads
            .run(|par| InverseFactor::new(&hessian, settings, par))
            .map_err(|damping| QuantizeError::Factorization { name: name.to_owned(), damping })?;
        if factor.damping > settings.damping {
            tracing::warn!(
                matrix = name,
                asked = settings.damping,
                used = factor.damping,
                "the Hessian is not positive definite; damping was raised"
            );
        }
        Ok(Self::Factored { hessian, factor, settings })
    }

    fn hessian(&self) -> Option<&Hessian> {
        match self {
            Self::Unknown => None,
            Self::Measured(hessian) | Self::Factored { hessian, .. } => Some(hessian),
        }
    }
}

/// Quantizes one matrix of `checkpoint` and measures its error.
pub(super) fn quantize_matrix(
    checkpoint: &Checkpoint,
    spec: &LinearSpec,
    settings: &Settings,
    statistics: &InputStatistics,
    threads: &Threads,
) -> Result<(QuantizedMatrix, MatrixReport), QuantizeError> {
    let (outputs, inputs) = (spec.out_features, spec.in_features);
    let values = checkpoint.dense(&format!("{}.weight", spec.name), outputs, inputs)?.to_f32();
    if let Some(position) = values.iter().position(|value| !value.is_finite()) {
        let (output, input) = (position / inputs, position % inputs);
        return Err(QuantizeError::NotFinite {
            name: spec.name.clone(),
            what: "the weights",
            found: format!("hold {} at output {output}, input {input}", values[position]),
            help: "the checkpoint is damaged; fetch or import it again",
        });
    }
    let weights = Weights { out_features: outputs, in_features: inputs, values: &values };
    let group_size = settings.group_size.inputs(inputs);
    let grid = Grid::new(settings);
    let (codes, grids) = threads.run(|par| match statistics {
        InputStatistics::Factored { hessian, factor, settings } => {
            let (mut codes, mut grids) = gptq::quantize(weights, grid, group_size, factor, par);
            let target = Target { weights, group_size, hessian, damping: factor.damping };
            refine(target, settings.refinement_sweeps, &mut codes, &mut grids, par);
            (codes, grids)
        }
        _ => rtn::quantize(weights, grid, group_size, &vec![1.0; inputs]),
    });
    let matrix = assemble(weights, settings.bits, group_size, codes, &grids)
        .map_err(QuantizeError::matrix(&spec.name))?;
    let report = measure(&spec.name, &matrix, &values, statistics.hessian(), threads);
    Ok((matrix, report))
}
