//! The dense product on CUDA: the tile of rows, and the grid.

use super::{Args, DenseMatmul};
use crate::backend::MatrixShape;
use crate::device::cuda::driver::{Address, Argument, Launch, Properties, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaDenseMatrix, Element};
use crate::error::KernelError;
use crate::ops::{entry_point, require_vectors, word};

const NAME: &str = "dense_matmul";

/// The kernels.
pub const SOURCE: Source = Source { name: NAME, text: include_str!("kernel.cu") };

/// Outputs and inputs of a tile, stages of the ring, threads of a block: constants of `kernel.cu`.
const TILE_OUTPUTS: usize = 128;
const STEP: usize = 64;
const STAGES: usize = 4;
const THREADS: usize = 256;

/// Rows of a tile, with the kernels for F16 and BF16.
const TILES: [(usize, [&str; 2]); 5] = [
    (8, ["dense_matmul_f16_8", "dense_matmul_bf16_8"]),
    (16, ["dense_matmul_f16_16", "dense_matmul_bf16_16"]),
    (32, ["dense_matmul_f16_32", "dense_matmul_bf16_32"]),
    (64, ["dense_matmul_f16_64", "dense_matmul_bf16_64"]),
    (128, ["dense_matmul_f16_128", "dense_matmul_bf16_128"]),
];

/// Shared memory of a block: the ring of weights and rows.
const fn shared_bytes(tile_rows: usize) -> usize {
    STAGES * (TILE_OUTPUTS + tile_rows) * STEP * 2
}

/// Where everything lies; a bias of 0 is none.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    input: Address,
    weight: Address,
    bias: Address,
    output: Address,
}

/// The launch for `rows` rows: the smallest tile that takes them all, or several of the largest that fits the card.
fn launch(
    shape: [usize; 3],
    element: Element,
    addresses: &Addresses,
    properties: &Properties,
) -> Result<Launch, KernelError> {
    let [rows, out_features, in_features] = shape;
    require_vectors(NAME, "in_features", in_features)?;
    let mut fitting =
        TILES.iter().filter(|tile| shared_bytes(tile.0) <= properties.shared_bytes_per_block as usize);
    let tile = fitting.clone().find(|tile| tile.0 >= rows).or_else(|| fitting.next_back());
    let (tile_rows, kernels) = *tile.unwrap_or(&TILES[0]);
    Ok(Launch {
        source: SOURCE,
        kernel: entry_point(element, kernels),
        grid: [rows.div_ceil(tile_rows) as u32, out_features.div_ceil(TILE_OUTPUTS) as u32, 1],
        block: THREADS as u32,
        shared_bytes: shared_bytes(tile_rows) as u32,
        arguments: [
            Argument::Address(addresses.input),
            Argument::Address(addresses.weight),
            Argument::Address(addresses.bias),
            Argument::Address(addresses.output),
            Argument::U32(word(NAME, "rows", rows)?),
            Argument::U32(word(NAME, "out_features", out_features)?),
            Argument::U32(word(NAME, "in_features", in_features)?),
        ]
        .into_iter()
        .collect(),
    })
}

impl DenseMatmul for Cuda {
    fn dense_matmul(&self, args: Args<'_, CudaBuffer, CudaDenseMatrix>) -> Result<(), KernelError> {
        args.check()?;
        if args.rows == 0 {
            return Ok(());
        }
        let addresses = Addresses {
            input: args.input.address(),
            weight: args.weight.address(),
            bias: args.bias.map_or(0, CudaBuffer::address),
            output: args.output.address(),
        };
        let shape = [args.rows, args.weight.out_features(), args.weight.in_features()];
        self.submit(&launch(shape, self.element(), &addresses, self.properties())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOWHERE: Addresses = Addresses { input: 0, weight: 0, bias: 0, output: 0 };

    fn card(shared_bytes_per_block: u32) -> Properties {
        Properties {
            name: "test".to_owned(),
            compute_capability: (8, 0),
            multiprocessors: 108,
            shared_bytes_per_block,
            memory_bytes: 0,
        }
    }

    fn launch_of(rows: usize, shared_bytes_per_block: u32) -> (&'static str, [u32; 3], u32) {
        let card = card(shared_bytes_per_block);
        let launch = launch([rows, 128_256, 8192], Element::F16, &NOWHERE, &card).unwrap();
        (launch.kernel, launch.grid, launch.shared_bytes)
    }

    #[test]
    fn the_smallest_tile_that_takes_all_rows_is_used() {
        assert_eq!(launch_of(1, 163 << 10), ("dense_matmul_f16_8", [1, 1002, 1], 69_632));
        assert_eq!(launch_of(9, 163 << 10), ("dense_matmul_f16_16", [1, 1002, 1], 73_728));
        assert_eq!(launch_of(64, 163 << 10), ("dense_matmul_f16_64", [1, 1002, 1], 98_304));
        assert_eq!(launch_of(129, 163 << 10), ("dense_matmul_f16_128", [2, 1002, 1], 131_072));
        assert_eq!(launch_of(129, 99 << 10), ("dense_matmul_f16_64", [3, 1002, 1], 98_304));
    }

    #[test]
    fn two_blocks_of_up_to_32_rows_share_a_multiprocessor_of_an_a100() {
        for rows in [8, 16, 32] {
            assert!(2 * (shared_bytes(rows) + 1024) <= 164 << 10, "{rows}");
        }
    }

    #[test]
    fn ragged_inputs_are_refused_by_name() {
        let refused = launch([1, 128, 65], Element::F16, &NOWHERE, &card(163 << 10)).unwrap_err().to_string();
        assert!(refused.contains("in_features"), "{refused}");
    }
}
