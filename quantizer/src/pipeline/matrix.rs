//! One weight matrix: its codes, and how far they are off.

use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::formats::ModuleSettings;
use nibble_model::forward::LinearSpec;

use crate::error::QuantizeError;
use crate::grid::Grid;
use crate::hessian::Hessian;
use crate::methods::correction::{Drift, correct};
use crate::methods::gptq::InverseFactor;
use crate::methods::{Weights, assemble, gptq, rtn};
use crate::report::{MatrixReport, measure};
use crate::settings::{Method, Settings};
use crate::threads::Threads;

/// What is known about an input of linear layers.
pub(super) enum InputStatistics {
    /// No calibration data.
    Unknown,
    /// Enough to measure an output error.
    Measured(Hessian),
    /// Enough for GPTQ and for correction.
    Factored { hessian: Hessian, factor: InverseFactor, drift: Option<Drift> },
}

impl InputStatistics {
    /// What `settings` need to know; `name` is the first linear layer that multiplies the input.
    pub(super) fn new(
        hessian: Hessian,
        drift: Option<Drift>,
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
        if !settings.factors() {
            return Ok(Self::Measured(hessian));
        }
        let order = settings.method.gptq().is_some_and(|gptq| gptq.activation_order);
        let factor = threads
            .run(|par| InverseFactor::new(&hessian, settings.damping, order, par))
            .map_err(|damping| QuantizeError::Factorization { name: name.to_owned(), damping })?;
        if factor.damping > settings.damping {
            tracing::warn!(
                matrix = name,
                asked = settings.damping,
                used = factor.damping,
                "the Hessian is not positive definite; damping was raised"
            );
        }
        Ok(Self::Factored { hessian, factor, drift })
    }

    fn hessian(&self) -> Option<&Hessian> {
        match self {
            Self::Unknown => None,
            Self::Measured(hessian) | Self::Factored { hessian, .. } => Some(hessian),
        }
    }
}

/// Quantizes the weight of the linear layer `spec` as `module` says and measures its error.
pub(super) fn quantize_matrix(
    mut values: Vec<f32>,
    spec: &LinearSpec,
    module: ModuleSettings,
    settings: &Settings,
    statistics: &InputStatistics,
    threads: &Threads,
) -> Result<(QuantizedMatrix, MatrixReport), QuantizeError> {
    let (outputs, inputs) = (spec.out_features, spec.in_features);
    if let InputStatistics::Factored { factor, drift: Some(drift), .. } = statistics {
        threads.run(|par| correct(&mut values, drift, factor, par));
    }
    let weights = Weights { out_features: outputs, in_features: inputs, values: &values };
    let group_size = module.group_size.inputs(inputs);
    let grid = Grid::new(module.bits, module.symmetric, settings.range);
    let (codes, grids) = threads.run(|par| match (statistics, settings.method.gptq()) {
        (InputStatistics::Factored { factor, .. }, Some(_)) => {
            gptq::quantize(weights, grid, group_size, factor, par)
        }
        _ => {
            let importance = match statistics.hessian() {
                Some(hessian) if settings.method == Method::Awq => {
                    (0..inputs).map(|input| hessian.diagonal(input)).collect()
                }
                _ => vec![1.0; inputs],
            };
            rtn::quantize(weights, grid, group_size, &importance)
        }
    });
    let matrix = assemble(weights, module.bits, group_size, codes, &grids)
        .map_err(QuantizeError::matrix(&spec.name))?;
    let report = measure(&spec.name, &matrix, &values, statistics.hessian(), threads);
    Ok((matrix, report))
}
