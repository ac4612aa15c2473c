//! `nibble bench kernels`: single operations, beside what the device's memory and, on the CPU, its arithmetic can do.

use anyhow::ensure;
use clap::Args;
use nibble_kernels::backend::Activations;
use nibble_kernels::backend::MatrixShape;
use nibble_kernels::device::cpu::Peak;
use nibble_kernels::ops::{dense_matmul, paged_attention, rms_norm, silu_mul, w4a16_matmul};
use nibble_kernels::tensor::{
    DenseMatrix, DenseValues, FloatType, GroupOffsets, QuantizedMatrix, QuantizedParts,
};
use nibble_kernels::{Backend, KernelError};
use serde::Serialize;
use serde_json::json;

use super::latency::median;
use crate::device::{ChosenDevice, ModelArguments, Work};
use crate::output::print_json;

/// Weights that are multiplied in turn take at least so many bytes: more than any cache holds.
const ROTATED_BYTES: usize = 256 << 20;

/// Quantized weights, outputs and inputs: those of Llama 3 70B (attention output, gate, down, query with key and value,
/// key), then those of 8B.
const WEIGHTS: [(usize, usize); 9] = [
    (8192, 8192),
    (28_672, 8192),
    (8192, 28_672),
    (10_240, 8192),
    (1024, 8192),
    (4096, 4096),
    (14_336, 4096),
    (4096, 14_336),
    (6144, 4096),
];

/// Arguments of `nibble bench kernels`.
#[derive(Debug, Args)]
pub(crate) struct KernelsArguments {
    /// Operations to measure; none measures the bandwidth of memory alone.
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "w4a16_matmul,dense_matmul,paged_attention,rms_norm,silu_mul"
    )]
    operations: Vec<String>,
    /// Rows of the products.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,8,16,32,64,128,256,1024")]
    rows: Vec<usize>,
    /// Measure the first N quantized weights of the list only.
    #[arg(long, value_name = "N", default_value_t = WEIGHTS.len())]
    weights: usize,
    /// Inputs that share a scale.
    #[arg(long, value_name = "N", default_value_t = 128)]
    group_size: usize,
    /// Give the quantized weights zero points.
    #[arg(long)]
    zero_points: bool,
    /// Measurements; the median is reported.
    #[arg(long, value_name = "N", default_value_t = 20)]
    repeats: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    run: ModelArguments,
}

/// A measured operation.
#[derive(Debug, Serialize)]
struct Measured {
    operation: &'static str,
    shape: String,
    microseconds: f64,
    /// Bytes it must read and write.
    bytes: f64,
    /// Multiplications and additions it must do.
    operations: f64,
    /// How long it would take at the limit that binds, and which that is.
    limit_microseconds: f64,
    limit: Limit,
}

/// What an operation cannot be faster than.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Limit {
    /// Its bytes at the bandwidth of memory.
    Memory,
    /// Its operations at the peak of the processor.
    Arithmetic,
}

/// What an operation multiplies.
#[derive(Clone, Copy)]
enum Arithmetic {
    Float,
    Products,
    Attention,
}

/// The limits of the device.
struct Limits {
    bytes_per_second: f64,
    peak: Option<Peak>,
}

impl Limits {
    /// The limit that binds for so many bytes and operations, and its microseconds.
    fn of(&self, arithmetic: Arithmetic, bytes: f64, operations: f64) -> (Limit, f64) {
        let memory = bytes / self.bytes_per_second * 1e6;
        let peak = self.peak.map(|peak| match arithmetic {
            Arithmetic::Float => peak.float,
            Arithmetic::Products => peak.products,
            Arithmetic::Attention => peak.attention,
        });
        match peak.map(|peak| operations / peak * 1e6) {
            Some(arithmetic) if arithmetic > memory => (Limit::Arithmetic, arithmetic),
            _ => (Limit::Memory, memory),
        }
    }
}

/// Runs the command.
pub(super) fn run(arguments: &KernelsArguments) -> anyhow::Result<()> {
    ensure!(arguments.repeats > 0, "--repeats must be at least 1");
    let device = arguments.run.device_or(FloatType::F16, Activations::Integer)?;
    let bandwidth = device.copy_bandwidth()?;
    let reads = device.read_bandwidth();
    let peak = device.peak();
    let limits = Limits { bytes_per_second: reads.unwrap_or(bandwidth), peak };
    if !arguments.json {
        println!("{}; copies {:.1} GB/s, read and written together", device.description(), bandwidth / 1e9);
        if let Some(reads) = reads {
            println!("reads {:.1} GB/s", reads / 1e9);
        }
        if let Some(Peak { float, products, attention }) = peak {
            let [float, products, attention] = [float, products, attention].map(|peak| peak / 1e12);
            println!("multiplies {float:.3} TFLOP/s, in products {products:.3}, in attention {attention:.3}");
        }
        println!("{:>10} {:>7} {:>8} {:>21}", "us", "GB/s", "TFLOP/s", "of its limit");
    }
    let mut measured = Vec::new();
    let mut report = |one: Measured| {
        if !arguments.json {
            let (bytes, operations) =
                (one.bytes / one.microseconds / 1e3, one.operations / one.microseconds / 1e6);
            let limit = match one.limit {
                Limit::Memory => "memory",
                Limit::Arithmetic => "arithmetic",
            };
            println!(
                "{:10.1} {bytes:7.1} {operations:8.3} {:6.1}% of {limit:<10}  {} {}",
                one.microseconds,
                100.0 * one.limit_microseconds / one.microseconds,
                one.operation,
                one.shape
            );
        }
        measured.push(one);
    };
    device.run(Measurement { device: &device, arguments, limits, report: &mut report })?;
    if arguments.json {
        print_json(&json!({
            "device": device.description(),
            "copy_bytes_per_second": bandwidth,
            "read_bytes_per_second": reads,
            "peak": peak.map(|Peak { float, products, attention }| {
                json!({ "float": float, "products": products, "attention": attention })
            }),
            "kernels": measured,
        }))?;
    }
    Ok(())
}

/// The measurements.
struct Measurement<'a> {
    device: &'a ChosenDevice,
    arguments: &'a KernelsArguments,
    limits: Limits,
    report: &'a mut dyn FnMut(Measured),
}

impl Work for Measurement<'_> {
    type Output = ();

    fn run<B: Backend + Send + 'static>(
        mut self,
        open: &dyn Fn() -> anyhow::Result<B>,
    ) -> anyhow::Result<()> {
        let backend = open()?;
        for operation in &self.arguments.operations {
            match operation.as_str() {
                "w4a16_matmul" => {
                    for (outputs, inputs) in WEIGHTS.into_iter().take(self.arguments.weights) {
                        self.quantized_products(&backend, outputs, inputs)?;
                    }
                }
                "dense_matmul" => self.dense_products(&backend)?,
                "paged_attention" => {
                    // Decoding 64 sequences, then prompts.
                    for (sequences, rows, tokens) in [
                        (64, 1, 1024),
                        (64, 1, 4096),
                        (1, 1, 1024),
                        (1, 1, 32_768),
                        (1, 2048, 2048),
                        (4, 512, 4096),
                    ] {
                        self.attention(&backend, sequences, rows, tokens)?;
                    }
                }
                "rms_norm" => self.norms(&backend)?,
                "silu_mul" => self.gates(&backend)?,
                "none" => {}
                other => anyhow::bail!("there is no measurement of {other}"),
            }
        }
        Ok(())
    }
}

impl Measurement<'_> {
    /// Times `submit`, which submits `launches` runs of the operation.
    fn measure(
        &mut self,
        (operation, shape): (&'static str, String),
        launches: usize,
        (arithmetic, bytes, operations): (Arithmetic, f64, f64),
        submit: &mut dyn FnMut() -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let seconds = median(self.device.time(self.arguments.repeats, submit)?);
        let microseconds = seconds * 1e6 / launches as f64;
        let (limit, limit_microseconds) = self.limits.of(arithmetic, bytes, operations);
        let measured =
            Measured { operation, shape, microseconds, bytes, operations, limit_microseconds, limit };
        (self.report)(measured);
        Ok(())
    }

    fn quantized_products<B: Backend>(
        &mut self,
        backend: &B,
        outputs: usize,
        inputs: usize,
    ) -> Result<(), KernelError> {
        let group_size = self.arguments.group_size;
        let first = backend.pack_quantized("weight", &random_matrix(outputs, inputs, self.arguments)?)?;
        let copies = ROTATED_BYTES.div_ceil(first.bytes()).max(2);
        let bytes = first.bytes();
        let mut weights = vec![first];
        while weights.len() < copies {
            weights.push(backend.copy_quantized(&weights[0])?);
        }
        for &rows in &self.arguments.rows {
            let input = ones(backend, rows * inputs)?;
            let mut output = backend.buffer(rows * outputs)?;
            let activations = rows * (inputs + outputs) * backend.activation_bytes();
            let operations = 2.0 * (rows * outputs) as f64 * inputs as f64;
            let work = (Arithmetic::Products, (bytes + activations) as f64, operations);
            let shape = format!("{rows} x {outputs} x {inputs}, groups of {group_size}");
            self.measure(("w4a16_matmul", shape), copies, work, &mut || {
                weights.iter().try_for_each(|weight| {
                    let products = &mut [w4a16_matmul::Product { weight, bias: None, output: &mut output }];
                    backend.w4a16_matmul(w4a16_matmul::Args { input: &input, products, rows })
                })
            })?;
        }
        Ok(())
    }

    fn dense_products<B: Backend>(&mut self, backend: &B) -> Result<(), KernelError> {
        // Llama 3's output head, of 8B.
        let (outputs, inputs) = (128_256, 4096);
        let values = vec![half::f16::from_f32(0.01); outputs * inputs];
        let matrix = DenseMatrix::new(outputs, inputs, DenseValues::F16(values.into()))?;
        let weight = backend.pack_dense("weight", &matrix)?;
        for rows in [1, 16, 64] {
            let input = ones(backend, rows * inputs)?;
            let mut output = backend.buffer(rows * outputs)?;
            let activations = rows * (inputs + outputs) * backend.activation_bytes();
            let operations = 2.0 * (rows * outputs) as f64 * inputs as f64;
            let work = (Arithmetic::Float, (weight.bytes() + activations) as f64, operations);
            self.measure(("dense_matmul", format!("{rows} x {outputs} x {inputs}")), 1, work, &mut || {
                let (input, weight, output) = (&input, &weight, &mut output);
                backend.dense_matmul(dense_matmul::Args { input, weight, bias: None, output, rows })
            })?;
        }
        Ok(())
    }

    /// `sequences` sequences of `tokens` tokens, the last `rows` of each in this step.
    fn attention<B: Backend>(
        &mut self,
        backend: &B,
        sequences: usize,
        rows: usize,
        tokens: usize,
    ) -> Result<(), KernelError> {
        let (heads, kv_heads, head_dim) = (64, 8, 128);
        let blocks_each = tokens.div_ceil(paged_attention::BLOCK_SIZE);
        let blocks = sequences * blocks_each;
        let elements = paged_attention::cache_elements(blocks, kv_heads, head_dim);
        let (key_cache, value_cache) = (backend.cache(elements)?, backend.cache(elements)?);
        let words = (0..sequences).flat_map(|at| [at * rows, rows, tokens - rows, at * blocks_each]);
        let words: Vec<u32> = words.map(|word| word as u32).collect();
        let tables: Vec<u32> = (0..blocks as u32).collect();
        let (mut table, mut block_tables) = (backend.indices(words.len())?, backend.indices(blocks)?);
        backend.write_indices(&words, &mut table)?;
        backend.write_indices(&tables, &mut block_tables)?;
        let all_rows = sequences * rows;
        let query = ones(backend, all_rows * heads * head_dim)?;
        let mut output = backend.buffer(all_rows * heads * head_dim)?;
        let activations = 2 * all_rows * heads * head_dim * backend.activation_bytes();
        let bytes = 2 * elements * backend.cache_element_bytes() + activations;
        let seen: usize = (0..rows).map(|row| tokens - rows + row + 1).sum();
        let operations = 4.0 * (sequences * heads * head_dim) as f64 * seen as f64;
        let shape = format!(
            "{sequences} sequences, {rows} of {tokens} tokens, {heads}/{kv_heads} heads of {head_dim}"
        );
        let work = (Arithmetic::Attention, bytes as f64, operations);
        self.measure(("paged_attention", shape), 1, work, &mut || {
            backend.paged_attention(paged_attention::Args {
                query: &query,
                key_cache: &key_cache,
                value_cache: &value_cache,
                sequences: &table,
                block_tables: &block_tables,
                output: &mut output,
                sequence_count: sequences,
                rows: all_rows,
                heads,
                kv_heads,
                head_dim,
                window: usize::MAX,
                longest: tokens,
                longest_rows: rows,
            })
        })
    }

    fn norms<B: Backend>(&mut self, backend: &B) -> Result<(), KernelError> {
        let width = 8192;
        for rows in [1, 64, 2048] {
            let mut residual = backend.buffer(rows * width)?;
            let (addend, weight) = (ones(backend, rows * width)?, ones(backend, width)?);
            let mut output = backend.buffer(rows * width)?;
            let bytes = ((4 * rows + 1) * width * backend.activation_bytes()) as f64;
            let operations = (5 * rows * width) as f64;
            self.measure(
                ("rms_norm", format!("{rows} x {width} + addend")),
                1,
                (Arithmetic::Float, bytes, operations),
                &mut || {
                    backend.rms_norm(rms_norm::Args {
                        residual: &mut residual,
                        addend: Some(&addend),
                        weight: &weight,
                        output: &mut output,
                        rows,
                        width,
                        epsilon: 1e-5,
                    })
                },
            )?;
        }
        Ok(())
    }

    fn gates<B: Backend>(&mut self, backend: &B) -> Result<(), KernelError> {
        for rows in [1, 64, 2048] {
            let elements = rows * 28_672;
            let (gate, up) = (ones(backend, elements)?, ones(backend, elements)?);
            let mut output = backend.buffer(elements)?;
            let bytes = (3 * elements * backend.activation_bytes()) as f64;
            let work = (Arithmetic::Float, bytes, (4 * elements) as f64);
            self.measure(("silu_mul", format!("{rows} x 28672")), 1, work, &mut || {
                backend.silu_mul(silu_mul::Args { gate: &gate, up: &up, output: &mut output, elements })
            })?;
        }
        Ok(())
    }
}

fn ones<B: Backend>(backend: &B, elements: usize) -> Result<B::Buffer, KernelError> {
    let mut buffer = backend.buffer(elements)?;
    backend.write(&vec![1.0; elements], &mut buffer)?;
    Ok(buffer)
}

/// Random codes with scales that keep products small.
fn random_matrix(
    outputs: usize,
    inputs: usize,
    arguments: &KernelsArguments,
) -> Result<QuantizedMatrix, KernelError> {
    let groups = inputs.div_ceil(arguments.group_size);
    let mut state = 1_u64;
    let mut code = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 60) as u8
    };
    QuantizedMatrix::new(QuantizedParts {
        out_features: outputs,
        in_features: inputs,
        bits: 4,
        group_size: arguments.group_size,
        codes: (0..outputs * inputs).map(|_| code()).collect(),
        scales: vec![1.0 / 1024.0; outputs * groups],
        offsets: GroupOffsets::ZeroPoints(
            (0..outputs * groups).map(|_| if arguments.zero_points { code() } else { 8 }).collect(),
        ),
        input_permutation: None,
    })
}
