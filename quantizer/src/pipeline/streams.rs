//! The calibration sequences on their way through the model: as the original computes them, and as the layers
//! quantized so far do.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};
use nibble_kernels::backend::Backend;
use nibble_model::checkpoint::{Checkpoint, CheckpointWriter, TensorFiles};
use nibble_model::error::CheckpointError;
use nibble_model::forward::{DecoderLayer, FinalNorm, HiddenStates, LayerRunner, LinearRole, Spill, embed};

use crate::calibration::Calibration;
use crate::error::QuantizeError;
use crate::hessian::{Hessian, HessianSum};
use crate::methods::correction::Drift;
use crate::threads::Threads;

/// What saved streams are called.
const QUANTIZED: &str = "quantized";
const ORIGINAL: &str = "original";

/// The four inputs of a decoder layer that linear layers multiply, in the order they are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinearInput {
    Attention,
    AttentionOutput,
    FeedForward,
    Gated,
}

impl LinearInput {
    /// All of them, in the order they are computed.
    pub(super) const ALL: [Self; 4] =
        [Self::Attention, Self::AttentionOutput, Self::FeedForward, Self::Gated];

    /// What the linear layer `role` multiplies.
    pub(super) fn of(role: LinearRole) -> Self {
        match role {
            LinearRole::Query | LinearRole::Key | LinearRole::Value => Self::Attention,
            LinearRole::AttentionOutput => Self::AttentionOutput,
            LinearRole::Gate | LinearRole::Up => Self::FeedForward,
            LinearRole::Down => Self::Gated,
        }
    }

    /// The linear layers that multiply it.
    pub(super) fn roles(self) -> &'static [LinearRole] {
        match self {
            Self::Attention => &[LinearRole::Query, LinearRole::Key, LinearRole::Value],
            Self::AttentionOutput => &[LinearRole::AttentionOutput],
            Self::FeedForward => &[LinearRole::Gate, LinearRole::Up],
            Self::Gated => &[LinearRole::Down],
        }
    }
}

/// A decoder layer that is being quantized.
pub(super) struct LayerPair<B: Backend> {
    /// With the linear layers that are quantized already, and the original ones where not.
    pub(super) quantized: DecoderLayer<B>,
    /// As it was, for the original stream.
    pub(super) original: Option<DecoderLayer<B>>,
}

/// The residual streams of every calibration sequence at one place of the model.
pub(super) struct Streams<B: Backend> {
    runner: LayerRunner<B>,
    widths: Widths,
    /// The residual stream of the quantized layers, `hidden_size` wide.
    hidden: HiddenStates,
    /// The input of the attention output projection, `heads * head_dim` wide.
    attention: HiddenStates,
    /// The residual stream of the original layers, where errors are to be corrected.
    original: Option<HiddenStates>,
}

#[derive(Clone, Copy)]
struct Widths {
    hidden: usize,
    attention: usize,
    gated: usize,
}

impl Widths {
    fn of(self, input: LinearInput) -> usize {
        match input {
            LinearInput::Attention | LinearInput::FeedForward => self.hidden,
            LinearInput::AttentionOutput => self.attention,
            LinearInput::Gated => self.gated,
        }
    }
}

impl<B: Backend> Streams<B> {
    /// The streams of the calibration tokens before the first layer: their embeddings, read row by row from the
    /// checkpoint; or where the run that saved `states` stood.
    ///
    /// `with_original` says whether the original model's stream is kept beside; `spill`, where the streams are kept
    /// if all of them take too much memory.
    pub(super) fn start(
        backend: B,
        checkpoint: &Checkpoint,
        calibration: &Calibration,
        with_original: bool,
        spill: &Spill,
        states: Option<&TensorFiles>,
    ) -> Result<Self, QuantizeError> {
        let config = checkpoint.config();
        let (hidden, attention) = (config.hidden_size, config.heads * config.head_dim);
        let widths = Widths { hidden, attention, gated: config.intermediate_size };
        let lengths: Vec<usize> = calibration.sequences().iter().map(Vec::len).collect();
        let elements = hidden * if with_original { 2 } else { 1 } + attention;
        let bytes = (lengths.iter().sum::<usize>() * elements * size_of::<f32>()) as u64;
        let memory_bytes = if bytes > spill.memory_bytes { 0 } else { u64::MAX };
        let spill = Spill { memory_bytes, ..spill.clone() };
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let mut streams = Self {
            runner: LayerRunner::new(backend, config, longest)?,
            widths,
            hidden: HiddenStates::new(&lengths, hidden, &spill)?,
            attention: HiddenStates::new(&lengths, attention, &spill)?,
            original: if with_original { Some(HiddenStates::new(&lengths, hidden, &spill)?) } else { None },
        };
        match states {
            Some(states) => streams.restore(states)?,
            None => streams.embed(checkpoint, calibration)?,
        }
        Ok(streams)
    }

    fn embed(&mut self, checkpoint: &Checkpoint, calibration: &Calibration) -> Result<(), QuantizeError> {
        for (index, tokens) in calibration.sequences().iter().enumerate() {
            let embedded = embed(checkpoint, tokens)?;
            self.hidden.write(index, &embedded)?;
            if let Some(original) = &mut self.original {
                original.write(index, &embedded)?;
            }
        }
        Ok(())
    }

    /// Writes the streams between two layers.
    pub(super) fn save(&self, writer: &mut CheckpointWriter) -> Result<(), CheckpointError> {
        self.hidden.save(writer, QUANTIZED)?;
        match &self.original {
            Some(original) => original.save(writer, ORIGINAL),
            None => Ok(()),
        }
    }

    fn restore(&mut self, states: &TensorFiles) -> Result<(), CheckpointError> {
        self.hidden.restore(states, QUANTIZED)?;
        match &mut self.original {
            Some(original) => original.restore(states, ORIGINAL),
            None => Ok(()),
        }
    }

    /// The device.
    pub(super) fn backend(&self) -> &B {
        self.runner.backend()
    }

    /// Brings every sequence to `input`, by the linear layers before it as they now are, and sums its Hessian
    /// and how far the quantized stream has drifted from the original there. `scales` is what the quantized layer
    /// divides each input by.
    pub(super) fn statistics(
        &mut self,
        layer: &LayerPair<B>,
        input: LinearInput,
        scales: Option<&[f32]>,
        threads: &Threads,
    ) -> Result<(Hessian, Option<Drift>), QuantizeError> {
        let Self { runner, widths, hidden, attention, original } = self;
        let LayerPair { quantized, original: original_layer } = layer;
        let width = widths.of(input);
        let mut sum = HessianSum::new(width);
        // Of outputs where the layer's outputs are added to the residual stream, else of inputs.
        let drift_rows = match input {
            LinearInput::Attention | LinearInput::FeedForward => width,
            LinearInput::AttentionOutput | LinearInput::Gated => widths.hidden,
        };
        let both = original.is_some() && original_layer.is_some();
        let mut drift = Mat::<f32>::zeros(if both { drift_rows } else { 0 }, width);
        let (mut stream, mut values) = (Vec::new(), Vec::new());
        let (mut target, mut difference) = (Vec::new(), Vec::new());
        for index in 0..hidden.sequences() {
            hidden.read(index, &mut stream)?;
            values.resize(stream.len() / widths.hidden * width, 0.0);
            match input {
                LinearInput::Attention => runner.attention_input(quantized, &stream, &mut values)?,
                LinearInput::AttentionOutput => {
                    runner.attention(quantized, &stream, &mut values)?;
                    attention.write(index, &values)?;
                }
                LinearInput::FeedForward => {
                    attention.read(index, &mut difference)?;
                    runner.add_attention(quantized, &difference, &mut stream)?;
                    hidden.write(index, &stream)?;
                    runner.feed_forward_input(quantized, &stream, &mut values)?;
                }
                LinearInput::Gated => runner.gated(quantized, &stream, &mut values)?,
            }
            threads.run(|par| sum.add(&values, par));
            let (Some(original), Some(layer)) = (&mut *original, original_layer) else { continue };
            original.read(index, &mut target)?;
            match input {
                LinearInput::Attention => {
                    difference.resize(target.len(), 0.0);
                    runner.attention_input(layer, &target, &mut difference)?;
                    divide(&mut difference, scales);
                    subtract(&mut difference, &values);
                }
                LinearInput::FeedForward => {
                    difference.resize(target.len(), 0.0);
                    runner.feed_forward_input(layer, &target, &mut difference)?;
                    divide(&mut difference, scales);
                    subtract(&mut difference, &values);
                }
                LinearInput::AttentionOutput => {
                    difference.resize(values.len(), 0.0);
                    runner.attention(layer, &target, &mut difference)?;
                    runner.add_attention(layer, &difference, &mut target)?;
                    original.write(index, &target)?;
                    runner.add_attention(quantized, &values, &mut stream)?;
                    difference.clone_from(&target);
                    subtract(&mut difference, &stream);
                }
                LinearInput::Gated => {
                    runner.add_feed_forward(layer, &mut target)?;
                    original.write(index, &target)?;
                    runner.add_gated(quantized, &values, &mut stream)?;
                    difference.clone_from(&target);
                    subtract(&mut difference, &stream);
                }
            }
            threads.run(|par| add_product(&mut drift, &difference, &values, par));
        }
        let drift = both.then(|| match input {
            LinearInput::Attention | LinearInput::FeedForward => Drift::OfInputs(drift),
            LinearInput::AttentionOutput | LinearInput::Gated => Drift::OfOutputs(drift),
        });
        Ok((sum.finish(), drift))
    }

    /// Sums the Hessian of the output head's input behind the last layer, and how far the quantized stream has drifted
    /// from the original there.
    pub(super) fn output_head_statistics(
        &mut self,
        norm: &FinalNorm<B>,
        threads: &Threads,
    ) -> Result<(Hessian, Option<Drift>), QuantizeError> {
        let Self { runner, widths, hidden, original, .. } = self;
        let width = widths.hidden;
        let mut sum = HessianSum::new(width);
        let mut drift = original.as_ref().map(|_| Mat::<f32>::zeros(width, width));
        let (mut stream, mut values, mut difference) = (Vec::new(), Vec::new(), Vec::new());
        for index in 0..hidden.sequences() {
            hidden.read(index, &mut stream)?;
            values.resize(stream.len(), 0.0);
            runner.output_head_input(norm, &stream, &mut values)?;
            threads.run(|par| sum.add(&values, par));
            if let (Some(original), Some(drift)) = (&original, &mut drift) {
                original.read(index, &mut stream)?;
                difference.resize(stream.len(), 0.0);
                runner.output_head_input(norm, &stream, &mut difference)?;
                subtract(&mut difference, &values);
                threads.run(|par| add_product(drift, &difference, &values, par));
            }
        }
        Ok((sum.finish(), drift.map(Drift::OfInputs)))
    }

    /// The Hessians of all inputs of `layer`, in the order of [`LinearInput::ALL`], for the quantized stream before it.
    pub(super) fn profile(
        &mut self,
        layer: &DecoderLayer<B>,
        threads: &Threads,
    ) -> Result<[Hessian; 4], QuantizeError> {
        let Self { runner, widths, hidden, .. } = self;
        let mut sums = LinearInput::ALL.map(|input| HessianSum::new(widths.of(input)));
        let mut values = LinearInput::ALL.map(|_| Vec::new());
        let mut stream = Vec::new();
        for index in 0..hidden.sequences() {
            hidden.read(index, &mut stream)?;
            for (values, input) in values.iter_mut().zip(LinearInput::ALL) {
                values.resize(stream.len() / widths.hidden * widths.of(input), 0.0);
            }
            let [attention_input, attention, feed_forward, gated] = &mut values;
            runner.attention_input(layer, &stream, attention_input)?;
            runner.attention(layer, &stream, attention)?;
            runner.add_attention(layer, attention, &mut stream)?;
            runner.feed_forward_input(layer, &stream, feed_forward)?;
            runner.gated(layer, &stream, gated)?;
            for (sum, values) in sums.iter_mut().zip(&values) {
                threads.run(|par| sum.add(values, par));
            }
        }
        Ok(sums.map(HessianSum::finish))
    }

    /// Brings every sequence through the whole `layer`.
    pub(super) fn advance(&mut self, layer: &DecoderLayer<B>) -> Result<(), QuantizeError> {
        let count = self.hidden.sequences();
        pass(&mut self.runner, layer, &mut self.hidden, count)
    }

    /// Brings the first `count` sequences of `others` through the whole `layer`.
    pub(super) fn pass(
        &mut self,
        layer: &DecoderLayer<B>,
        others: &mut HiddenStates,
        count: usize,
    ) -> Result<(), QuantizeError> {
        pass(&mut self.runner, layer, others, count)
    }

    /// Brings a copy of the first tokens of the first sequences, as many as `lengths` say, through the whole `layer`
    /// and puts them into `others` from sequence `first` on.
    pub(super) fn branch(
        &mut self,
        layer: &DecoderLayer<B>,
        lengths: &[usize],
        others: &mut HiddenStates,
        first: usize,
    ) -> Result<(), QuantizeError> {
        for (index, &tokens) in lengths.iter().enumerate() {
            let mut stream = self.hidden(index, tokens)?;
            self.runner.forward(layer, &mut stream)?;
            others.write(first + index, &stream)?;
        }
        Ok(())
    }

    /// The residual stream of the first `tokens` tokens of sequence `index`.
    pub(super) fn hidden(&self, index: usize, tokens: usize) -> Result<Vec<f32>, QuantizeError> {
        let mut stream = Vec::new();
        self.hidden.read(index, &mut stream)?;
        stream.truncate(tokens * self.widths.hidden);
        Ok(stream)
    }

    /// Gives the device back.
    pub(super) fn into_backend(self) -> B {
        self.runner.into_backend()
    }

    /// Brings the quantized stream of every sequence to the end of `layer`, all of whose inputs it has passed.
    pub(super) fn finish_layer(&mut self, layer: &LayerPair<B>) -> Result<(), QuantizeError> {
        let mut stream = Vec::new();
        for index in 0..self.hidden.sequences() {
            self.hidden.read(index, &mut stream)?;
            self.runner.add_feed_forward(&layer.quantized, &mut stream)?;
            self.hidden.write(index, &stream)?;
        }
        Ok(())
    }
}

fn pass<B: Backend>(
    runner: &mut LayerRunner<B>,
    layer: &DecoderLayer<B>,
    states: &mut HiddenStates,
    count: usize,
) -> Result<(), QuantizeError> {
    let mut stream = Vec::new();
    for index in 0..count {
        states.read(index, &mut stream)?;
        runner.forward(layer, &mut stream)?;
        states.write(index, &stream)?;
    }
    Ok(())
}

fn subtract(from: &mut [f32], values: &[f32]) {
    for (from, value) in from.iter_mut().zip(values) {
        *from -= value;
    }
}

/// Divides each vector of `values` by `scales`, where there are any.
fn divide(values: &mut [f32], scales: Option<&[f32]>) {
    let Some(scales) = scales else { return };
    for vector in values.chunks_exact_mut(scales.len()) {
        vector.iter_mut().zip(scales).for_each(|(value, scale)| *value /= scale);
    }
}

/// Adds `left^T right` for row-major `left` `[tokens, rows]` and `right` `[tokens, columns]`.
fn add_product(sum: &mut Mat<f32>, left: &[f32], right: &[f32], par: Par) {
    let (rows, columns) = (sum.nrows(), sum.ncols());
    let tokens = right.len() / columns.max(1);
    let left = MatRef::from_row_major_slice(left, tokens, rows).transpose();
    let right = MatRef::from_row_major_slice(right, tokens, columns);
    matmul(sum.as_mut(), Accum::Add, left, right, 1.0, par);
}
