//! What CUDA kernels do not do is refused by name, and nothing is launched for nothing.

use nibble_kernels::KernelError;
use nibble_kernels::device::cuda::Element;
use nibble_kernels::ops::embedding::{self, Embedding};
use nibble_kernels::ops::gather_rows::{self, GatherRows};
use nibble_kernels::ops::rms_norm::{self, RmsNorm};
use nibble_kernels::ops::rotary_embedding::{self, RotaryEmbedding};
use nibble_kernels::ops::silu_mul::{self, SiluMul};

use crate::lab::{Lab, TestDevice};

fn norm(device: &TestDevice, rows: usize, width: usize) -> Result<(), KernelError> {
    let values = vec![1.0; rows.max(1) * width];
    let (mut residual, mut output) = (device.upload(&values), device.upload(&values));
    let weight = &device.upload(&values[..width]);
    let args = rms_norm::Args {
        residual: &mut residual,
        addend: None,
        weight,
        output: &mut output,
        rows,
        width,
        epsilon: 0.0,
    };
    device.cuda.rms_norm(args)
}

fn rotation(device: &TestDevice, rows: usize, head_dim: usize) -> Result<(), KernelError> {
    let mut buffers = [(); 8].map(|()| device.upload(&vec![0.0; 16 * head_dim]));
    let words = device.words(&[0]);
    let [query, key, value, cosines, sines, key_cache, value_cache, _] = &mut buffers;
    let args = rotary_embedding::Args {
        query,
        key,
        value,
        cosines,
        sines,
        positions: &words,
        slots: &words,
        key_cache,
        value_cache,
        rows,
        heads: 1,
        kv_heads: 1,
        head_dim,
    };
    device.cuda.rotary_embedding(args)
}

fn lookup(device: &TestDevice, rows: usize, hidden: usize) -> Result<(), KernelError> {
    let (table, token_ids) = (&device.matrix(2, hidden, &vec![1.0; 2 * hidden]), &device.words(&[0]));
    let output = &mut device.poisoned(hidden);
    device.cuda.embedding(embedding::Args { token_ids, table, output, rows })
}

fn selection(device: &TestDevice, count: usize, width: usize) -> Result<(), KernelError> {
    let (input, rows) = (&device.upload(&vec![1.0; width]), &device.words(&[0]));
    let output = &mut device.poisoned(width);
    device.cuda.gather_rows(gather_rows::Args { input, rows, output, count, width })
}

#[test]
fn widths_without_a_kernel_are_refused_by_name() {
    let device = Lab::sound().device(Element::BF16, 0);
    let refused = [
        (norm(&device, 1, 12), "rms_norm: width is 12; must be a positive multiple of 8 on CUDA"),
        (norm(&device, 1, 16_392), "rms_norm: width is 16392; must be at most 16384 on CUDA"),
        (rotation(&device, 1, 24), "rotary_embedding: head_dim is 24; must be a multiple of 16 on CUDA"),
        (lookup(&device, 1, 4), "embedding: hidden is 4; must be a positive multiple of 8 on CUDA"),
        (selection(&device, 1, 9), "gather_rows: width is 9; must be a positive multiple of 8 on CUDA"),
    ];
    for (outcome, message) in refused {
        assert_eq!(outcome.unwrap_err().to_string(), message);
    }
}

#[test]
fn no_rows_are_no_launch() {
    let device = Lab::sound().device(Element::F16, 0);
    // A launch without blocks would be refused.
    norm(&device, 0, 64).unwrap();
    rotation(&device, 0, 64).unwrap();
    lookup(&device, 0, 64).unwrap();
    selection(&device, 0, 64).unwrap();
    let values = device.upload(&[1.0]);
    let output = &mut device.poisoned(1);
    device.cuda.silu_mul(silu_mul::Args { gate: &values, up: &values, output, elements: 0 }).unwrap();
}
