//! Through the model, one decoder layer at a time.
//!
//! ```text
//! hidden = embedding of the calibration tokens
//! for each decoder layer:
//!     where inputs are to be scaled: find the scales, fold them into the layer
//!     for each input of linear layers (query/key/value, attention output, gate/up, down):
//!         run the layer up to there, with what is quantized already     -> Hessian of the input
//!         quantize the linear layers that multiply it, write them, put them into the layer
//!     hidden = the quantized layer's output
//! where the output head is to be quantized: the same with it, for the normed hidden states
//! ```
//!
//! Every matrix is quantized for the inputs it will get, those of the quantized layers before it. Held in memory:
//! the layer's weights, one Hessian with its factorization, two hidden states for each calibration token and three
//! where errors are corrected. What is finished is in the [journal](crate::journal); the output is put together
//! from it at the end.

mod layer_tensors;
mod matrix;
mod sensitivity;
mod streams;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::time::Duration;

use nibble_kernels::backend::Backend;
use nibble_kernels::tensor::QuantizedMatrix;
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, DEFAULT_SHARD_BYTES, LinearWeight};
use nibble_model::config::ModelConfig;
use nibble_model::formats::{ModuleSettings, QuantizationConfig};
use nibble_model::forward::{
    DecoderLayer, FinalNorm, Linear, LinearRole, LinearSpec, OutputHead, Spill, check_dense,
};

use self::layer_tensors::{LayerTensors, finite_weight};
use self::matrix::{InputStatistics, quantize_matrix};
use self::sensitivity::Survey;
use self::streams::{LayerPair, LinearInput, Streams};
use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::grid::Grid;
use crate::journal::{self, Journal};
use crate::methods::Weights;
use crate::methods::awq::{self, SharedInput};
use crate::output;
use crate::plan::{Plan, specs};
use crate::report::{MatrixReport, Report, RunLogits};
use crate::settings::{RangeSearch, Settings};
use crate::threads::Threads;

/// Tokens behind which the quantized model's logits are kept.
const PROMPT_TOKENS: usize = 16;

/// How far a run has come.
#[derive(Clone, Copy, Debug)]
pub enum Progress<'a> {
    /// The sensitivities of linear layers are being measured.
    Surveyed {
        /// Decoder layers measured.
        layers_done: usize,
        /// Decoder layers in all.
        layers: usize,
    },
    /// Weights are being quantized.
    Quantized {
        /// Linear layers that are done.
        matrices_done: usize,
        /// Linear layers in all.
        matrices: usize,
        /// The last one.
        matrix: &'a MatrixReport,
    },
}

/// How a run is done, without influence on its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// Whether to go on with a run of the same output that did not finish.
    pub resume: bool,
    /// How much time passes between two states that a run can be resumed from.
    pub journal_interval: Duration,
    /// Bytes of calibration states above which they are kept in files beside the output.
    pub memory_limit: u64,
}

/// Quantizes `checkpoint` into the new directory `out`, running calibration on `backend`.
///
/// Without `calibration`, [`Method::RoundToNearest`](crate::Method::RoundToNearest) only looks at the weights.
///
/// # Errors
/// When the settings do not fit the model, GPTQ has no calibration data, a file is wrong, numbers are not
/// finite, or `out` exists or cannot be written. Nothing is left at `out` then; layers that were finished are in
/// `OUT.resume`.
pub fn quantize<B: Backend>(
    backend: B,
    checkpoint: &Checkpoint,
    out: &Path,
    settings: &Settings,
    calibration: Option<&Calibration>,
    options: RunOptions,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Report, QuantizeError> {
    settings.check(checkpoint.config())?;
    check_dense(checkpoint)?;
    let checkpoint = &checkpoint.padded(settings.padded(checkpoint.config())?.intermediate_size);
    warn_of_ranks(settings, checkpoint.config());
    if calibration.is_none() && settings.needs_calibration() {
        return Err(QuantizeError::Settings {
            name: "--calibration".to_owned(),
            found: "missing".to_owned(),
            expected: format!("calibration data, which --method {} needs", settings.method.name()),
            help: "name one, or use --method rtn".to_owned(),
        });
    }
    let parent = CheckpointWriter::check(out)?;
    let threads = Threads::new(settings.threads)?;
    let plan = settings.plan(checkpoint.config());
    // Known to be possible before any work is done.
    settings.quantization_config(&plan)?;
    let identity = journal::identity(checkpoint, settings, calibration);
    let mut journal = Journal::open(out, &identity, options.resume, options.journal_interval)?;
    let spill = Spill { memory_bytes: options.memory_limit, directory: parent };
    let resumed_layers = journal.finished().min(checkpoint.config().layers);
    let job = Job { checkpoint, out, settings, calibration, spill, threads };
    match job.run(backend, plan, &mut journal, progress) {
        Err(error) if journal.finished() > 0 => {
            tracing::warn!(
                finished = journal.finished(),
                journal = %journal.directory().display(),
                "the finished layers are kept; --resume goes on with them"
            );
            Err(error)
        }
        Err(error) => journal.remove().map_err(QuantizeError::from).and(Err(error)),
        Ok(report) => {
            journal.remove()?;
            Ok(Report { resumed_layers, ..report })
        }
    }
}

/// What is asked for, once it is known to be possible.
struct Job<'a> {
    checkpoint: &'a Checkpoint,
    out: &'a Path,
    settings: &'a Settings,
    calibration: Option<&'a Calibration>,
    spill: Spill,
    threads: Threads,
}

impl Job<'_> {
    /// Spends bits where they are asked for, quantizes what `journal` does not hold yet, and writes the output.
    fn run<B: Backend>(
        self,
        mut backend: B,
        mut plan: Plan,
        journal: &mut Journal,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Report, QuantizeError> {
        let Self { checkpoint, out, settings, calibration, spill, threads } = self;
        let mut sensitivities = Vec::new();
        if let (Some(target_bits), Some(calibration)) = (settings.target_bits, calibration) {
            sensitivities = match journal.sensitivities()? {
                Some(sensitivities) => sensitivities,
                None => {
                    let survey = Survey { checkpoint, settings, plan: &plan, threads: &threads };
                    let layers = checkpoint.config().layers;
                    let mut done = |layers_done| progress(Progress::Surveyed { layers_done, layers });
                    let (returned, found) =
                        survey.choose(backend, target_bits, calibration, &spill, &mut done)?;
                    backend = returned;
                    journal.save_sensitivities(&found)?;
                    found
                }
            };
            plan.spend(&sensitivities);
        }
        let quantization = settings.quantization_config(&plan)?;
        let run = Run { checkpoint, settings, plan, calibration, quantization, threads };
        // Behind the last part there are no states: only the output is to be put together.
        if journal.finished() < run.parts() {
            let streams = match calibration {
                Some(calibration) => {
                    let (states, original) = (journal.states()?, settings.correction);
                    Some(Streams::start(backend, checkpoint, calibration, original, &spill, states.as_ref())?)
                }
                None => None,
            };
            run.parts_left(journal, streams, progress)?;
        }
        let report = run.write(journal, out)?;
        Ok(Report { errors_are_of_outputs: calibration.is_some(), sensitivities, ..report })
    }
}

/// Warns of ranks that the padding is for and that the attention heads cannot be split over.
fn warn_of_ranks(settings: &Settings, config: &ModelConfig) {
    if let Some(ranks) = settings.pad_for_tensor_parallel.filter(|&ranks| config.heads % ranks != 0) {
        let heads = config.heads;
        tracing::warn!(%ranks, heads, "the ranks to pad for do not divide the attention heads of the model");
    }
}

/// What a run has from its beginning to its end.
struct Run<'a> {
    checkpoint: &'a Checkpoint,
    settings: &'a Settings,
    calibration: Option<&'a Calibration>,
    plan: Plan,
    quantization: QuantizationConfig,
    threads: Threads,
}

impl Run<'_> {
    /// What the journal holds in the end: the decoder layers, and the output head behind them where it is quantized.
    fn parts(&self) -> usize {
        self.checkpoint.config().layers + usize::from(self.plan.quantize_lm_head())
    }

    /// Quantizes every part that `journal` does not hold yet, of which there is one.
    fn parts_left<B: Backend>(
        &self,
        journal: &mut Journal,
        mut streams: Option<Streams<B>>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), QuantizeError> {
        let config = self.checkpoint.config();
        let (layers, parts) = (config.layers, self.parts());
        let specs = || specs(config, self.plan.quantize_lm_head());
        let is_quantized = |spec: &LinearSpec| self.plan.settings_of(&spec.name).is_some();
        let matrices = specs().filter(is_quantized).count();
        let before = LinearRole::ALL.len() * journal.finished();
        let mut matrices_done = specs().take(before).filter(is_quantized).count();
        let mut head = None;
        for index in journal.finished()..parts {
            let mut writer = journal.layer_writer(index)?;
            let mut reports: Vec<MatrixReport> = Vec::with_capacity(LinearRole::ALL.len());
            let mut done = |report| {
                reports.push(report);
                matrices_done += 1;
                let matrix = &reports[reports.len() - 1];
                progress(Progress::Quantized { matrices_done, matrices, matrix });
            };
            if index < layers {
                self.layer(index, streams.as_mut(), &mut writer, &mut done)?;
            } else {
                head = self.output_head(streams.as_mut(), &mut writer, &mut done)?;
            }
            let due = journal.finish_layer(writer, &reports)?;
            if due && index + 1 < parts {
                journal.save_states(index, |writer| match &streams {
                    Some(streams) => streams.save(writer),
                    None => Ok(()),
                })?;
            }
        }
        if let Some(streams) = streams {
            journal.save_logits(&self.logits(streams, head)?)?;
        }
        Ok(journal.save_states(parts - 1, |_| Ok(()))?)
    }

    /// The logits that the quantized model has behind the first tokens of the first calibration sequence, computed from
    /// what is in memory; `head` is the output head if it was quantized.
    fn logits<B: Backend>(
        &self,
        streams: Streams<B>,
        head: Option<QuantizedMatrix>,
    ) -> Result<RunLogits, QuantizeError> {
        let Self { checkpoint, calibration, .. } = self;
        let tokens: Vec<u32> =
            calibration.iter().flat_map(|data| &data.sequences()[0]).copied().take(PROMPT_TOKENS).collect();
        let hidden = streams.hidden(0, tokens.len())?;
        let backend = streams.into_backend();
        let mut output = match head {
            Some(head) => {
                let name = LinearSpec::output_head(checkpoint.config()).name;
                let head = Linear::pack(&backend, &name, &LinearWeight::Quantized(head), None);
                OutputHead::with(backend, checkpoint, head.map_err(QuantizeError::matrix(&name))?)?
            }
            None => OutputHead::load(backend, checkpoint)?,
        };
        let last = &hidden[hidden.len() - checkpoint.config().hidden_size..];
        Ok(RunLogits { tokens, logits: output.logits(last)?.values })
    }

    /// Quantizes layer `index`, writes its linear layers, and brings `streams` to its end.
    fn layer<B: Backend>(
        &self,
        index: usize,
        mut streams: Option<&mut Streams<B>>,
        writer: &mut CheckpointWriter,
        done: &mut dyn FnMut(MatrixReport),
    ) -> Result<(), QuantizeError> {
        let Self { checkpoint, settings, plan, quantization, threads, .. } = self;
        let mut tensors = LayerTensors::new(checkpoint, index);
        let mut layer = match &streams {
            Some(streams) => Some(LayerPair {
                quantized: DecoderLayer::load(streams.backend(), checkpoint, index)?,
                original: match settings.correction {
                    true => Some(DecoderLayer::load(streams.backend(), checkpoint, index)?),
                    false => None,
                },
            }),
            None => None,
        };
        if let (true, Some(streams), Some(layer)) =
            (settings.method.scales_inputs(), &mut streams, &mut layer)
        {
            self.scale_inputs(streams, &mut layer.quantized, &mut tensors)?;
        }
        tensors.write(writer)?;
        for input in LinearInput::ALL {
            let statistics = match (&mut streams, &layer) {
                (Some(streams), Some(layer)) => {
                    let scales = tensors.input_scales(input);
                    let (hessian, drift) = streams.statistics(layer, input, scales.as_deref(), threads)?;
                    let name = input.roles()[0].spec(checkpoint.config(), index).name;
                    InputStatistics::new(hessian, drift, settings, &name, threads)?
                }
                _ => InputStatistics::Unknown,
            };
            for &role in input.roles() {
                let spec = role.spec(checkpoint.config(), index);
                let weights = tensors.weight(role)?;
                let Some(module) = plan.settings_of(&spec.name) else {
                    tensors.write_weight(role, &weights, writer)?;
                    if let (true, Some(streams), Some(layer)) =
                        (settings.method.scales_inputs(), &streams, &mut layer)
                    {
                        // The norm before it is divided by scales that only these weights have.
                        layer.quantized.replace(role, tensors.linear(streams.backend(), role, weights)?);
                    }
                    continue;
                };
                let (matrix, report) =
                    quantize_matrix(weights, &spec, module, settings, &statistics, threads)?;
                quantization.write_linear(writer, &spec.name, &matrix)?;
                done(report);
                if let (Some(streams), Some(layer)) = (&streams, &mut layer) {
                    let (matrix, bias) = (LinearWeight::Quantized(matrix), tensors.bias(role)?);
                    let linear = Linear::pack(streams.backend(), &spec.name, &matrix, bias.as_deref());
                    layer.quantized.replace(role, linear.map_err(QuantizeError::matrix(&spec.name))?);
                }
            }
        }
        match (streams, &layer) {
            (Some(streams), Some(layer)) => streams.finish_layer(layer),
            _ => Ok(()),
        }
    }

    /// Quantizes the output head, whose inputs are not scaled, and writes it; `streams` are behind the last layer.
    /// Returns it unless it is kept as it was.
    fn output_head<B: Backend>(
        &self,
        streams: Option<&mut Streams<B>>,
        writer: &mut CheckpointWriter,
        done: &mut dyn FnMut(MatrixReport),
    ) -> Result<Option<QuantizedMatrix>, QuantizeError> {
        let Self { checkpoint, settings, plan, quantization, threads, .. } = self;
        let spec = LinearSpec::output_head(checkpoint.config());
        let Some(module) = plan.settings_of(&spec.name) else {
            let kept = checkpoint.raw(&spec.weight_name())?;
            output::copy_tensors([kept].into_iter(), writer)?;
            return Ok(None);
        };
        let statistics = match streams {
            Some(streams) => {
                let norm = FinalNorm::load(streams.backend(), checkpoint)?;
                let (hessian, drift) = streams.output_head_statistics(&norm, threads)?;
                InputStatistics::new(hessian, drift, settings, &spec.name, threads)?
            }
            None => InputStatistics::Unknown,
        };
        let weights = finite_weight(checkpoint, &spec)?;
        let (matrix, report) = quantize_matrix(weights, &spec, module, settings, &statistics, threads)?;
        quantization.write_linear(writer, &spec.name, &matrix)?;
        done(report);
        Ok(Some(matrix))
    }

    /// Finds scales for the inputs of `layer`, which is not quantized yet, and folds them into it and `tensors`.
    fn scale_inputs<B: Backend>(
        &self,
        streams: &mut Streams<B>,
        layer: &mut DecoderLayer<B>,
        tensors: &mut LayerTensors<'_>,
    ) -> Result<(), QuantizeError> {
        let hessians = streams.profile(layer, &self.threads)?;
        for (input, hessian) in LinearInput::ALL.into_iter().zip(hessians) {
            let inputs = hessian.inputs();
            let first = input.roles()[0].spec(self.checkpoint.config(), tensors.index);
            let ModuleSettings { bits, group_size, symmetric, .. } =
                self.plan.settings_of(&first.name).unwrap_or(self.plan.default());
            let scale_of_input: Vec<usize> = match input {
                LinearInput::AttentionOutput => tensors.value_channels(),
                _ => (0..inputs).collect(),
            };
            let values = input.roles().iter().map(|&role| tensors.weight(role));
            let values = values.collect::<Result<Vec<_>, _>>()?;
            let matrices: Vec<Weights<'_>> = values
                .iter()
                .map(|values| Weights { out_features: values.len() / inputs, in_features: inputs, values })
                .collect();
            let shared = SharedInput {
                matrices: &matrices,
                hessian: &hessian,
                scale_of_input: &scale_of_input,
                scales: scale_of_input.iter().max().map_or(0, |last| last + 1),
                group_size: group_size.inputs(inputs),
                grid: Grid::new(bits, symmetric, RangeSearch::MinMax),
            };
            let scales = self.threads.run(|par| awq::search(&shared, par));
            tensors.fold(input, scales)?;
        }
        tensors.fold_into(streams.backend(), layer)
    }

    /// Puts the output together from `journal`, which holds every layer.
    fn write(&self, journal: &Journal, out: &Path) -> Result<Report, QuantizeError> {
        let config = self.checkpoint.config();
        let mut writer = CheckpointWriter::create_within(journal.directory(), out, DEFAULT_SHARD_BYTES)?;
        output::write_files(self.checkpoint, &mut writer, &self.quantization)?;
        let head = self.plan.quantize_lm_head().then(|| LinearSpec::output_head(config));
        output::copy_shared_tensors(self.checkpoint, head.as_ref(), &mut writer)?;
        let mut layers = Vec::with_capacity(config.layers * LinearRole::ALL.len());
        for index in 0..self.parts() {
            output::copy_tensors(journal.layer(index)?.tensors(), &mut writer)?;
            layers.extend(journal.reports(index)?);
        }
        writer.finish()?;
        let weights = layers.iter().map(|matrix| matrix.weights as f64);
        let bits = layers.iter().map(|matrix| matrix.bits_per_weight * matrix.weights as f64);
        Ok(Report {
            bits_per_weight: bits.sum::<f64>() / weights.sum::<f64>().max(1.0),
            errors_are_of_outputs: false,
            resumed_layers: 0,
            sensitivities: Vec::new(),
            layers,
            logits: journal.logits()?,
        })
    }
}
