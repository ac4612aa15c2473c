//! The dense product on CUDA: the tile of rows, and the grid.

use super::{Args, DenseMatmul};
use crate::backend::MatrixShape;
use crate::device::cuda::driver::{Address, Argument, Launch, Properties, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaDenseMatrix, Element};
use crate::error::KernelError;
use crate::ops::{entry_point, require_vectors, word};

const NAME: &str = "dense_matmul";

/// The kernels.
pub const SOURCE: Source = Source { name: NAME, variant: "", text: include_str!("kernel.cu") };

/// A kernel's tile: the template parameters of `kernel.cu`.
#[derive(Clone, Copy, Debug)]
struct Tile {
    outputs: usize,
    rows: usize,
    warps: usize,
    step: usize,
    stages: usize,
    /// For F16 and BF16.
    kernels: [&'static str; 2],
}

impl Tile {
    /// Shared memory of a block: the ring of weights and rows.
    const fn shared_bytes(&self) -> usize {
        self.stages * (self.outputs + self.rows) * self.step * 2
    }
}

macro_rules! tile {
    ($outputs:literal, $rows:literal, warps $warps:literal, step $step:literal, stages $stages:literal) => {
        Tile {
            outputs: $outputs,
            rows: $rows,
            warps: $warps,
            step: $step,
            stages: $stages,
            kernels: [
                concat!("dense_matmul_f16_", $outputs, "_", $rows),
                concat!("dense_matmul_bf16_", $outputs, "_", $rows),
            ],
        }
    };
}

/// Tiles for weights with many outputs, by rows.
const WIDE: [Tile; 5] = [
    tile!(128, 8, warps 8, step 64, stages 4),
    tile!(128, 16, warps 8, step 64, stages 4),
    tile!(128, 32, warps 8, step 64, stages 4),
    tile!(128, 64, warps 8, step 64, stages 4),
    tile!(128, 128, warps 8, step 64, stages 4),
];

/// Tiles for weights with few.
const NARROW: [Tile; 4] = [
    tile!(32, 8, warps 2, step 128, stages 6),
    tile!(32, 16, warps 2, step 128, stages 6),
    tile!(32, 32, warps 4, step 128, stages 4),
    tile!(32, 64, warps 8, step 128, stages 4),
];

/// The tile for a product: the fewest rows that take all, or the most that fit the card; narrow where wide tiles would
/// leave multiprocessors without one.
fn choose(rows: usize, out_features: usize, properties: &Properties) -> &'static Tile {
    let of = |tiles: &'static [Tile]| {
        let mut fitting =
            tiles.iter().filter(|tile| tile.shared_bytes() <= properties.shared_bytes_per_block as usize);
        fitting.clone().find(|tile| tile.rows >= rows).or_else(|| fitting.next_back()).unwrap_or(&tiles[0])
    };
    let wide = of(&WIDE);
    let blocks = rows.div_ceil(wide.rows) * out_features.div_ceil(wide.outputs);
    if blocks < properties.multiprocessors as usize { of(&NARROW) } else { wide }
}

/// Where everything lies; a bias of 0 is none.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    input: Address,
    weight: Address,
    bias: Address,
    output: Address,
}

fn launch(
    [rows, out_features, in_features]: [usize; 3],
    element: Element,
    addresses: &Addresses,
    properties: &Properties,
) -> Result<Launch, KernelError> {
    require_vectors(NAME, "in_features", in_features)?;
    let tile = choose(rows, out_features, properties);
    Ok(Launch {
        source: SOURCE,
        kernel: entry_point(element, tile.kernels),
        grid: [rows.div_ceil(tile.rows) as u32, out_features.div_ceil(tile.outputs) as u32, 1],
        block: 32 * tile.warps as u32,
        shared_bytes: tile.shared_bytes() as u32,
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
        }
    }

    fn launch_of(
        rows: usize,
        out_features: usize,
        shared_bytes_per_block: u32,
    ) -> (&'static str, [u32; 3], u32) {
        let card = card(shared_bytes_per_block);
        let launch = launch([rows, out_features, 8192], Element::F16, &NOWHERE, &card).unwrap();
        (launch.kernel, launch.grid, launch.shared_bytes)
    }

    #[test]
    fn the_smallest_tile_that_takes_all_rows_is_used() {
        let head = |rows| launch_of(rows, 128_256, 163 << 10);
        assert_eq!(head(1), ("dense_matmul_f16_128_8", [1, 1002, 1], 69_632));
        assert_eq!(head(9), ("dense_matmul_f16_128_16", [1, 1002, 1], 73_728));
        assert_eq!(head(64), ("dense_matmul_f16_128_64", [1, 1002, 1], 98_304));
        assert_eq!(head(129), ("dense_matmul_f16_128_128", [2, 1002, 1], 131_072));
        assert_eq!(launch_of(129, 128_256, 99 << 10), ("dense_matmul_f16_128_64", [3, 1002, 1], 98_304));
    }

    #[test]
    fn few_outputs_are_dealt_to_more_blocks() {
        assert_eq!(launch_of(1, 4096, 163 << 10), ("dense_matmul_f16_32_8", [1, 128, 1], 61_440));
        assert_eq!(launch_of(64, 4096, 163 << 10), ("dense_matmul_f16_32_64", [1, 128, 1], 98_304));
        assert_eq!(launch_of(512, 4096, 163 << 10), ("dense_matmul_f16_128_128", [4, 32, 1], 131_072));
        assert_eq!(launch_of(300, 1024, 163 << 10), ("dense_matmul_f16_32_64", [5, 32, 1], 98_304));
    }

    #[test]
    fn two_blocks_of_up_to_32_rows_share_a_multiprocessor_of_an_a100() {
        for tile in WIDE.iter().chain(&NARROW).filter(|tile| tile.rows <= 32) {
            assert!(2 * (tile.shared_bytes() + 1024) <= 164 << 10, "{tile:?}");
        }
    }

    #[test]
    fn ragged_inputs_are_refused_by_name() {
        let refused = launch([1, 128, 65], Element::F16, &NOWHERE, &card(163 << 10)).unwrap_err().to_string();
        assert!(refused.contains("in_features"), "{refused}");
    }
}
