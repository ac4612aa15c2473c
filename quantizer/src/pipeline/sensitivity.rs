//! How much each linear layer matters, and where a few more bits go.
//!
//! Linear layers that multiply the same input form a unit (query/key/value, attention output, gate/up, down): readers
//! that fuse them need the same settings for all. Each unit alone is rounded to nearest, and a few probe sequences go on
//! with it to the end of the model:
//!
//! ```text
//! kl(unit)             = mean over probe tokens of KL(original || unit rounded), at the logits
//! loss(unit, settings) = sum over its groups of step^2 / 12 * sum over inputs of 1 / U[j, j]^2
//! effect               = kl(unit) * loss(unit, settings) / squared output error of the rounded unit
//! ```
//!
//! where `U` is the inverse factor of GPTQ: the loss is what GPTQ is going to leave on the outputs, as far as steps and
//! inputs tell, so no settings are tried out. All rounded streams pass through a layer while it is in memory: the
//! model is read once. [`allocate`] then spends the bits.

use nibble_kernels::backend::Backend;
use nibble_model::checkpoint::{Checkpoint, LinearWeight};
use nibble_model::evaluation::kl_divergence;
use nibble_model::formats::{GroupSize, ModuleSettings};
use nibble_model::forward::{DecoderLayer, HiddenStates, Linear, LinearRole, LinearSpec, OutputHead, Spill};

use super::layer_tensors::LayerTensors;
use super::streams::{LinearInput, Streams};
use crate::allocation::{Offer, Unit, allocate};
use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::grid::Grid;
use crate::hessian::Hessian;
use crate::methods::gptq::InverseFactor;
use crate::methods::{Weights, assemble, rtn};
use crate::plan::{Plan, stored_bits};
use crate::report::UnitSensitivity;
use crate::settings::{RangeSearch, Settings};
use crate::threads::Threads;

/// Calibration sequences that the inputs of every layer are measured on.
const PROFILED_SEQUENCES: usize = 8;
/// Of these, sequences that are followed to the logits, and tokens of each.
const PROBES: usize = 2;
const PROBE_TOKENS: usize = 256;
/// The smallest group on offer, and the bits.
const SMALLEST_GROUP: usize = 32;
const MANY_BITS: u32 = 8;

/// What the pass works with.
pub(super) struct Survey<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) settings: &'a Settings,
    /// What linear layers get when nothing is spent on them.
    pub(super) plan: &'a Plan,
    pub(super) threads: &'a Threads,
}

/// A unit that was measured.
struct Measured {
    layer: usize,
    input: LinearInput,
    weights: usize,
    kl_divergence: f64,
    /// Squared output error when rounded to nearest.
    rounding_error: f64,
    /// Bits and group size, bits for each weight, and loss of each offer.
    offers: Vec<(u32, GroupSize, f64, f64)>,
}

impl Survey<'_> {
    /// Measures every unit of the model and chooses its settings, so that weights take `target_bits` in the mean.
    pub(super) fn choose<B: Backend>(
        &self,
        backend: B,
        target_bits: f64,
        calibration: &Calibration,
        spill: &Spill,
        progress: &mut dyn FnMut(usize),
    ) -> Result<(B, Vec<UnitSensitivity>), QuantizeError> {
        let Self { checkpoint, threads, .. } = *self;
        let config = checkpoint.config();
        let profiled = calibration.first(PROFILED_SEQUENCES);
        let mut streams = Streams::start(backend, checkpoint, &profiled, false, spill, None)?;
        let sequences = profiled.sequences().iter().take(PROBES);
        let probes: Vec<usize> = sequences.map(|tokens| tokens.len().min(PROBE_TOKENS)).collect();
        let units = config.layers * LinearInput::ALL.len();
        let mut rounded = HiddenStates::new(&probes.repeat(units), config.hidden_size, spill)?;
        let mut measured: Vec<Measured> = Vec::with_capacity(units);
        for index in 0..config.layers {
            let mut layer = DecoderLayer::load(streams.backend(), checkpoint, index)?;
            streams.pass(&layer, &mut rounded, measured.len() * probes.len())?;
            let hessians = streams.profile(&layer, threads)?;
            for (input, hessian) in LinearInput::ALL.into_iter().zip(hessians) {
                let unit = self.unit(streams.backend(), &mut layer, index, input, &hessian)?;
                streams.branch(&layer, &probes, &mut rounded, measured.len() * probes.len())?;
                measured.push(unit);
                for &role in input.roles() {
                    let original = Linear::load(streams.backend(), checkpoint, &role.spec(config, index))?;
                    layer.replace(role, original);
                }
            }
            streams.advance(&layer)?;
            progress(index + 1);
        }
        let backend = self.divergences(streams, &probes, &rounded, &mut measured)?;
        // What stays as it is has no offers and takes no part.
        measured.retain(|unit| !unit.offers.is_empty());
        let head = self.plan.quantize_lm_head().then(|| self.output_head()).flatten();
        let units: Vec<Unit> = measured.iter().map(Measured::unit).chain(head).collect();
        let chosen = allocate(&units, target_bits);
        let report = measured.iter().zip(chosen).map(|(unit, choice)| unit.report(checkpoint, choice));
        Ok((backend, report.collect()))
    }

    /// The output head as a unit that bits are counted for and not spent on, where it is quantized.
    fn output_head(&self) -> Option<Unit> {
        let spec = LinearSpec::output_head(self.checkpoint.config());
        let module = self.plan.settings_of(&spec.name)?;
        let bits_per_weight = stored_bits(module.bits, module.group_size, spec.in_features);
        let weights = spec.out_features * spec.in_features;
        Some(Unit { weights, offers: vec![Offer { bits_per_weight, effect: 0.0 }] })
    }

    /// Rounds the linear layers of `input` in `layer` to nearest and measures what offers they have.
    fn unit<B: Backend>(
        &self,
        backend: &B,
        layer: &mut DecoderLayer<B>,
        index: usize,
        input: LinearInput,
        hessian: &Hessian,
    ) -> Result<Measured, QuantizeError> {
        let Self { checkpoint, settings, threads, .. } = *self;
        let name = |role: LinearRole| role.spec(checkpoint.config(), index).name;
        let factor = threads
            .run(|par| InverseFactor::new(hessian, settings.damping, true, par))
            .map_err(|damping| QuantizeError::Factorization { name: name(input.roles()[0]), damping })?;
        let importance = factor.importance();
        let mut unit = Measured {
            layer: index,
            input,
            weights: 0,
            kl_divergence: 0.0,
            rounding_error: 0.0,
            offers: self.offers(index, input),
        };
        let tensors = LayerTensors::new(checkpoint, index);
        for &role in input.roles() {
            let spec = role.spec(checkpoint.config(), index);
            let values = tensors.weight(role)?;
            unit.weights += values.len();
            let weights =
                Weights { out_features: spec.out_features, in_features: spec.in_features, values: &values };
            for (bits, group_size, _, loss) in &mut unit.offers {
                let grid = Grid::new(*bits, settings.symmetric, RangeSearch::MinMax);
                *loss += expected_loss(weights, grid, group_size.inputs(spec.in_features), &importance);
            }
            let Some(module) = self.plan.settings_of(&spec.name) else { continue };
            let group_size = module.group_size.inputs(spec.in_features);
            let grid = Grid::new(module.bits, module.symmetric, RangeSearch::MinMax);
            let (codes, grids) =
                threads.run(|_| rtn::quantize(weights, grid, group_size, &vec![1.0; spec.in_features]));
            let matrix = assemble(weights, module.bits, group_size, codes, &grids)
                .map_err(QuantizeError::matrix(&spec.name))?;
            let difference: Vec<f32> =
                matrix.dequantize().iter().zip(&values).map(|(rounded, value)| rounded - value).collect();
            unit.rounding_error +=
                threads.run(|par| hessian.energy_by_input(&difference, par)).iter().sum::<f64>();
            let (matrix, bias) = (LinearWeight::Quantized(matrix), tensors.bias(role)?);
            let linear = Linear::pack(backend, &spec.name, &matrix, bias.as_deref());
            layer.replace(role, linear.map_err(QuantizeError::matrix(&spec.name))?);
        }
        Ok(unit)
    }

    /// What can be spent on the linear layers of `input`: smaller and smaller groups, and 8 bits. The first is what
    /// they get for nothing; where an override says what they get, or that they stay as they are, it is the only one.
    fn offers(&self, index: usize, input: LinearInput) -> Vec<(u32, GroupSize, f64, f64)> {
        let config = self.checkpoint.config();
        let specs: Vec<_> = input.roles().iter().map(|role| role.spec(config, index)).collect();
        let width = specs[0].in_features;
        let offer = |bits, group_size| (bits, group_size, stored_bits(bits, group_size, width), 0.0);
        let Some(module) = self.plan.settings_of(&specs[0].name) else { return Vec::new() };
        let mut offers = vec![offer(module.bits, module.group_size)];
        if specs.iter().any(|spec| self.plan.is_fixed(&spec.name)) {
            return offers;
        }
        let mut sizes = vec![module.group_size.inputs(width)];
        while let Some(half) = sizes.last().map(|size| size / 2).filter(|&size| size >= SMALLEST_GROUP) {
            sizes.push(half);
        }
        let finer = sizes[1..].iter().map(|&size| (module.bits, GroupSize::Inputs(size)));
        let more_bits = (module.bits < MANY_BITS).then_some((MANY_BITS, module.group_size));
        let fits = |&(bits, group_size): &(u32, GroupSize)| {
            let settings = ModuleSettings { bits, group_size, ..module };
            specs.iter().all(|spec| {
                spec.in_features.is_multiple_of(group_size.inputs(spec.in_features))
                    && self.settings.format.check(settings, spec.out_features, spec.in_features).is_ok()
            })
        };
        offers.extend(finer.chain(more_bits).filter(fits).map(|(bits, group_size)| offer(bits, group_size)));
        offers
    }

    /// Brings the ends of all streams to logits and compares them.
    fn divergences<B: Backend>(
        &self,
        streams: Streams<B>,
        probes: &[usize],
        rounded: &HiddenStates,
        measured: &mut [Measured],
    ) -> Result<B, QuantizeError> {
        let originals: Vec<Vec<f32>> = probes
            .iter()
            .enumerate()
            .map(|(probe, &tokens)| streams.hidden(probe, tokens))
            .collect::<Result<_, _>>()?;
        let mut head = OutputHead::load(streams.into_backend(), self.checkpoint)?;
        let originals = originals.iter().map(|hidden| head.logits(hidden)).collect::<Result<Vec<_>, _>>()?;
        let mut hidden = Vec::new();
        for (index, unit) in measured.iter_mut().enumerate() {
            let mut sum = 0.0;
            for (probe, original) in originals.iter().enumerate() {
                rounded.read(index * probes.len() + probe, &mut hidden)?;
                let logits = head.logits(&hidden)?;
                let rows = 0..logits.rows;
                sum += rows.map(|row| kl_divergence(original.row(row), logits.row(row))).sum::<f64>();
            }
            unit.kl_divergence = sum / probes.iter().sum::<usize>().max(1) as f64;
        }
        Ok(head.into_backend())
    }
}

/// The squared output error that rounding leaves when errors are even over a step and GPTQ makes up for what it can.
fn expected_loss(weights: Weights<'_>, grid: Grid, group_size: usize, importance: &[f32]) -> f64 {
    let ones = vec![1.0; group_size];
    let of_group = |(weights, importance): (&[f32], &[f32])| {
        if weights.iter().all(|&weight| weight == 0.0) {
            return 0.0; // Rounded to themselves, whatever the step.
        }
        let step = f64::from(grid.fit(weights, &ones[..weights.len()]).scale);
        step * step / 12.0 * importance.iter().map(|&value| f64::from(value)).sum::<f64>()
    };
    let rows = weights.values.chunks_exact(weights.in_features);
    rows.flat_map(|row| row.chunks(group_size).zip(importance.chunks(group_size))).map(of_group).sum()
}

impl Measured {
    fn unit(&self) -> Unit {
        let scale = if self.rounding_error > 0.0 { self.kl_divergence / self.rounding_error } else { 0.0 };
        let offers = self.offers.iter();
        Unit {
            weights: self.weights,
            offers: offers
                .map(|&(_, _, bits_per_weight, loss)| Offer { bits_per_weight, effect: scale * loss })
                .collect(),
        }
    }

    fn report(&self, checkpoint: &Checkpoint, choice: usize) -> UnitSensitivity {
        let specs = self.input.roles().iter().map(|role| role.spec(checkpoint.config(), self.layer));
        let specs: Vec<_> = specs.collect();
        let (bits, group_size, ..) = self.offers[choice];
        UnitSensitivity {
            kl_divergence: self.kl_divergence,
            bits,
            group_size: group_size.inputs(specs[0].in_features),
            raised: choice > 0,
            linear_layers: specs.into_iter().map(|spec| spec.name).collect(),
        }
    }
}
