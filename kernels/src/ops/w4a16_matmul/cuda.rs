//! The product on a CUDA device: which kernel, how many blocks, which arguments.

use arrayvec::ArrayVec;

use super::layout::{STEP_INPUTS, TILE_OUTPUTS, packed_groups};
use super::{Args, Product, W4a16Matmul};
use crate::backend::MatrixShape;
use crate::device::cuda::driver::{Address, Argument, Launch, Properties, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaPackedMatrix, Element, WORKSPACE_BYTES};
use crate::error::KernelError;
use crate::ops::word;

const NAME: &str = "w4a16_matmul";
/// Threads of a block.
const THREADS: u32 = 256;
/// Fewest (tile, step) pairs of a worker: below it, adding up the parts would cost more than it brings.
const MIN_SHARE: usize = 4;
/// Rows of the forms of the kernel, and the entry points that stream the weights once.
const STREAMS: [(usize, &str); 5] = [
    (8, "w4a16_stream_8"),
    (16, "w4a16_stream_16"),
    (32, "w4a16_stream_32"),
    (64, "w4a16_stream_64"),
    (128, "w4a16_stream_128"),
];
/// Rows of a tile of the form for large batches.
const TILE_ROWS: usize = 128;
/// Share of the multiprocessors' time that the form for large batches must use to be taken.
const TILES_OCCUPANCY: f64 = 0.8;
/// Rounds of blocks from which on it is taken whatever the last round uses.
const TILES_ROUNDS: usize = 3;
/// Most bytes of partial sums; the rest of the workspace is for permuted inputs.
const PARTIAL_SUM_BYTES: usize = 48 << 20;
/// Most blocks of a grid in y.
const MAX_GRID_Y: usize = 65_535;

macro_rules! source {
    ($element:literal, $group:literal, $zeros:literal) => {
        Source {
            name: NAME,
            variant: concat!($element, "-", $group, "-", $zeros),
            text: concat!(
                "#define ELEMENT ",
                $element,
                "\n#define GROUP_SIZE ",
                $group,
                "\n#define HAS_ZERO_POINTS ",
                $zeros,
                "\n",
                include_str!("kernel.cu")
            ),
        }
    };
}

/// Every variant of the kernel's source: element, group size and zero points.
pub static SOURCES: [Source; 12] = [
    source!("F16", "32", "0"),
    source!("F16", "32", "1"),
    source!("F16", "64", "0"),
    source!("F16", "64", "1"),
    source!("F16", "128", "0"),
    source!("F16", "128", "1"),
    source!("BF16", "32", "0"),
    source!("BF16", "32", "1"),
    source!("BF16", "64", "0"),
    source!("BF16", "64", "1"),
    source!("BF16", "128", "0"),
    source!("BF16", "128", "1"),
];

fn source(element: Element, group_size: usize, zero_points: bool) -> Source {
    let element = match element {
        Element::F16 => 0,
        Element::BF16 => 6,
    };
    let group = match group_size {
        32 => 0,
        64 => 2,
        _ => 4,
    };
    SOURCES[element + group + usize::from(zero_points)]
}

/// Most matrices of a launch.
const MOST_MATRICES: usize = 3;

/// A matrix's size and addresses, and those of its product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) codes: Address,
    pub(crate) scales: Address,
    pub(crate) zero_points: Address,
    pub(crate) bias: Option<Address>,
    pub(crate) output: Address,
    pub(crate) out_features: usize,
}

/// The products of one launch: matrices of the same inputs, groups and kind.
#[derive(Clone, Debug)]
pub(crate) struct Products {
    pub(crate) element: Element,
    pub(crate) input: Address,
    pub(crate) matrices: ArrayVec<Matrix, MOST_MATRICES>,
    pub(crate) rows: usize,
    pub(crate) in_features: usize,
    pub(crate) group_size: usize,
    /// Without, all are 8.
    pub(crate) zero_points: bool,
}

/// How a product is cut into blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Rows of this launch; more need another one.
    rows: usize,
    kernel: &'static str,
    grid: [u32; 3],
    shared_bytes: u32,
    /// (tile, step) pairs of a worker. Depends on the weight's shape and the device alone: it fixes the order in which a
    /// row's terms are added.
    share: u32,
    /// Bytes of partial sums.
    pub(crate) workspace_bytes: usize,
    /// Words that count arrivals.
    pub(crate) counters: usize,
}

impl Matrix {
    fn tiles(&self) -> usize {
        self.out_features.div_ceil(TILE_OUTPUTS)
    }
}

impl Products {
    fn steps(&self) -> usize {
        self.in_features.div_ceil(STEP_INPUTS)
    }

    fn tiles(&self) -> usize {
        self.matrices.iter().map(Matrix::tiles).sum()
    }

    fn groups_per_step(&self) -> usize {
        (STEP_INPUTS / self.group_size).max(1)
    }

    /// Bytes of a stage of shared memory for `rows` rows, and how many stages a block has; as `Form` in kernel.cu.
    fn stages(&self, rows: usize, device: &Properties) -> (usize, usize) {
        let activations = rows * STEP_INPUTS * 2;
        let codes = TILE_OUTPUTS * STEP_INPUTS / 2;
        let scale = if self.zero_points { 3 } else { 2 };
        let factors = TILE_OUTPUTS * self.groups_per_step() * scale;
        let bytes = (activations + codes + factors).next_multiple_of(1024);
        let limit = match device.compute_capability {
            (8, 6 | 9) | (12.., _) => 99 * 1024,
            (9, 0) => 227 * 1024,
            _ => 163 * 1024,
        };
        (bytes, (limit / bytes).clamp(2, 6))
    }

    fn shared_bytes(&self, rows: usize, device: &Properties) -> usize {
        let (bytes, stages) = self.stages(rows, device);
        bytes * stages
    }

    /// The first `rows` rows, or all that are left; what remains are those after them.
    fn split_off(&mut self, rows: usize) -> Self {
        let first = Self { rows: rows.min(self.rows), ..self.clone() };
        let after = |features: usize| (first.rows * features * self.element.bytes()) as Address;
        self.input += after(self.in_features);
        for (matrix, before) in self.matrices.iter_mut().zip(&first.matrices) {
            matrix.output += after(before.out_features);
        }
        self.rows -= first.rows;
        first
    }

    /// Decides form and grid.
    pub(crate) fn plan(&self, device: &Properties) -> Plan {
        let multiprocessors = device.multiprocessors as usize;
        let units = self.tiles() * self.steps();
        let share = units.div_ceil(multiprocessors).max(MIN_SHARE);
        let workers = units.div_ceil(share);
        let fits = |rows: usize| self.shared_bytes(rows, device) <= device.shared_bytes_per_block as usize;
        let slot = |rows: usize| rows * TILE_OUTPUTS * size_of::<f32>();

        let fitting = || STREAMS.into_iter().filter(|&(rows, _)| fits(rows));
        let smallest = fitting().find(|&(rows, _)| rows >= self.rows);
        let (rows, kernel) = smallest.or_else(|| fitting().next_back()).unwrap_or(STREAMS[0]);
        let most_blocks = PARTIAL_SUM_BYTES / (workers * slot(rows));
        let row_blocks = self.rows.div_ceil(rows).min(most_blocks).max(1);
        let stream = Plan {
            rows: self.rows.min(row_blocks * rows),
            kernel,
            grid: [workers as u32, row_blocks as u32, 1],
            shared_bytes: self.shared_bytes(rows, device) as u32,
            share: share as u32,
            workspace_bytes: row_blocks * workers * slot(rows),
            counters: row_blocks * self.tiles(),
        };

        let jobs = self.tiles() * self.rows.div_ceil(TILE_ROWS);
        let rounds = jobs.div_ceil(multiprocessors);
        let occupancy = jobs as f64 / (rounds * multiprocessors) as f64;
        let fills = occupancy >= TILES_OCCUPANCY || rounds >= TILES_ROUNDS;
        // Where the other form would need several launches, a card half full is enough.
        let cut = stream.rows < self.rows && occupancy >= TILES_OCCUPANCY / 2.0;
        let large = self.rows > TILE_ROWS && (fills || cut);
        if !(large && fits(TILE_ROWS)) {
            return stream;
        }
        let blocks = jobs.min(multiprocessors);
        Plan {
            rows: self.rows,
            kernel: "w4a16_tiles_128",
            grid: [blocks as u32, 1, 1],
            shared_bytes: self.shared_bytes(TILE_ROWS, device) as u32,
            workspace_bytes: blocks * slot(TILE_ROWS),
            counters: 0,
            ..stream
        }
    }

    /// The launch of `plan`, with its partial sums and its counters at the given addresses.
    ///
    /// # Errors
    /// When a size is too large for the kernel.
    pub(crate) fn launch(
        &self,
        plan: &Plan,
        partial_sums: Address,
        arrivals: Address,
    ) -> Result<Launch, KernelError> {
        let number = |argument, value| Ok::<_, KernelError>(Argument::U32(word(NAME, argument, value)?));
        let mut arguments = ArrayVec::from_iter([
            Argument::Address(self.input),
            Argument::Address(partial_sums),
            Argument::Address(arrivals),
            number("rows", self.rows)?,
            number("in_features", self.in_features)?,
            number("in_features", self.steps())?,
            number("out_features", self.tiles())?,
            number("group_size", packed_groups(self.in_features, self.group_size))?,
            number("group_size", (self.group_size / STEP_INPUTS).max(1))?,
            Argument::U32(plan.share),
        ]);
        let mut first_tile = 0;
        for index in 0..MOST_MATRICES {
            let matrix = self.matrices.get(index);
            let address = |part: fn(&Matrix) -> Address| Argument::Address(matrix.map_or(0, part));
            let weights = |part: fn(&Matrix) -> Address| Argument::Weights(matrix.map_or(0, part));
            arguments.extend([
                weights(|matrix| matrix.codes),
                weights(|matrix| matrix.scales),
                weights(|matrix| matrix.zero_points),
                address(|matrix| matrix.bias.unwrap_or(0)),
                address(|matrix| matrix.output),
                number("out_features", matrix.map_or(0, |matrix| matrix.out_features))?,
                number("out_features", first_tile)?,
            ]);
            first_tile += matrix.map_or(0, Matrix::tiles);
        }
        Ok(Launch {
            source: source(self.element, self.group_size, self.zero_points),
            kernel: plan.kernel,
            grid: plan.grid,
            block: THREADS,
            shared_bytes: plan.shared_bytes,
            arguments,
        })
    }
}

/// Copies columns of `rows` rows into the order in which the weight's groups are stored.
fn permutation_launch(
    product: &Products,
    permutation: Address,
    permuted: Address,
) -> Result<Launch, KernelError> {
    Ok(Launch {
        source: source(product.element, product.group_size, product.zero_points),
        kernel: "w4a16_permute_inputs",
        grid: [
            word(NAME, "in_features", product.in_features.div_ceil(THREADS as usize))?,
            word(NAME, "rows", product.rows)?,
            1,
        ],
        block: THREADS,
        shared_bytes: 0,
        arguments: ArrayVec::from_iter([
            Argument::Address(product.input),
            Argument::Address(permutation),
            Argument::Address(permuted),
            Argument::U32(word(NAME, "in_features", product.in_features)?),
        ]),
    })
}

impl W4a16Matmul for Cuda {
    fn w4a16_matmul(&self, args: Args<'_, '_, CudaBuffer, CudaPackedMatrix>) -> Result<(), KernelError> {
        args.check()?;
        let Args { input, products, rows } = args;
        for alike in products.chunk_by(|a, b| go_together(a.weight, b.weight)) {
            for together in alike.chunks(MOST_MATRICES) {
                multiply(self, input, together, rows)?;
            }
        }
        Ok(())
    }
}

/// Whether one launch can do the products of both weights, which have the same inputs.
fn go_together(first: &CudaPackedMatrix, second: &CudaPackedMatrix) -> bool {
    let is_permuted = first.permutation.is_some() || second.permutation.is_some();
    let kind = |matrix: &CudaPackedMatrix| (matrix.group_size, matrix.zero_points.bytes() > 0);
    !is_permuted && kind(first) == kind(second)
}

/// Multiplies by up to [`MOST_MATRICES`] weights that [`go_together`].
fn multiply(
    cuda: &Cuda,
    input: &CudaBuffer,
    products: &[Product<'_, CudaBuffer, CudaPackedMatrix>],
    rows: usize,
) -> Result<(), KernelError> {
    let Some(Product { weight, .. }) = products.first() else { return Ok(()) };
    let matrix = |product: &Product<'_, CudaBuffer, CudaPackedMatrix>| Matrix {
        codes: product.weight.codes.address(),
        scales: product.weight.scales.address(),
        zero_points: product.weight.zero_points.address(),
        bias: product.bias.map(CudaBuffer::address),
        output: product.output.address(),
        out_features: product.weight.out_features(),
    };
    let mut rest = Products {
        element: cuda.element(),
        input: input.address(),
        matrices: products.iter().map(matrix).collect(),
        rows,
        in_features: weight.in_features(),
        group_size: weight.group_size,
        zero_points: weight.zero_points.bytes() > 0,
    };
    let Some(permutation) = &weight.permutation else {
        return submit(cuda, rest);
    };
    // As many rows at once as the workspace holds: a row's bits do not depend on the others.
    let permuted = cuda.workspace(WORKSPACE_BYTES)? + PARTIAL_SUM_BYTES as Address;
    let most = (WORKSPACE_BYTES - PARTIAL_SUM_BYTES) / (rest.in_features * rest.element.bytes());
    KernelError::require(most > 0, NAME, "in_features", rest.in_features, "must be at most 8388608")?;
    while rest.rows > 0 {
        let part = rest.split_off(most.min(MAX_GRID_Y));
        cuda.submit(&permutation_launch(&part, permutation.address(), permuted)?)?;
        submit(cuda, Products { input: permuted, ..part })?;
    }
    Ok(())
}

/// Submits products, in several launches when the workspace does not hold the partial sums of one.
fn submit(cuda: &Cuda, products: Products) -> Result<(), KernelError> {
    let mut rest = products;
    while rest.rows > 0 {
        let plan = rest.plan(cuda.properties());
        let part = rest.split_off(plan.rows);
        let partial_sums = cuda.workspace(plan.workspace_bytes)?;
        cuda.submit(&part.launch(&plan, partial_sums, cuda.counters(plan.counters)?)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(multiprocessors: u32, compute_capability: (u32, u32), kibibytes: u32) -> Properties {
        Properties {
            name: "test".to_owned(),
            compute_capability,
            multiprocessors,
            shared_bytes_per_block: kibibytes * 1024,
        }
    }

    fn matrix(out_features: usize) -> Matrix {
        Matrix { codes: 0, scales: 0, zero_points: 0, bias: None, output: 0, out_features }
    }

    fn product(rows: usize, out_features: usize, in_features: usize, group_size: usize) -> Products {
        Products {
            element: Element::F16,
            input: 0,
            matrices: ArrayVec::from_iter([matrix(out_features)]),
            rows,
            in_features,
            group_size,
            zero_points: group_size == 32,
        }
    }

    #[test]
    fn every_plan_fits_the_device_and_its_workspace() {
        let devices = [
            device(108, (8, 0), 163),
            device(84, (8, 6), 99),
            device(128, (8, 9), 99),
            device(132, (9, 0), 227),
            device(148, (10, 0), 227),
            device(170, (12, 0), 99),
        ];
        for device in &devices {
            for (outputs, inputs) in
                [(8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672), (8, 8), (576, 1536)]
            {
                for group_size in [32, 64, 128, 256] {
                    for rows in [1, 8, 9, 16, 64, 65, 128, 129, 256, 1000, 4096, 20_000] {
                        let plan = product(rows, outputs, inputs, group_size).plan(device);
                        let what = format!("{rows} x {outputs} x {inputs} on {device:?}: {plan:?}");
                        assert!(plan.shared_bytes <= device.shared_bytes_per_block, "{what}");
                        assert!(plan.workspace_bytes <= PARTIAL_SUM_BYTES, "{what}");
                        assert!(plan.grid[1] <= 65_535, "{what}");
                        assert!(SOURCES[0].text.contains(&format!(" {}(", plan.kernel)), "{what}");
                    }
                }
            }
        }
    }

    #[test]
    fn the_order_of_a_row_s_terms_does_not_depend_on_the_number_of_rows() {
        let device = device(108, (8, 0), 163);
        for (outputs, inputs) in [(8192, 8192), (1024, 8192), (28672, 8192), (96, 576)] {
            let share = product(1, outputs, inputs, 128).plan(&device).share;
            for rows in 2..600 {
                assert_eq!(product(rows, outputs, inputs, 128).plan(&device).share, share);
            }
        }
    }

    #[test]
    fn matrices_of_a_launch_share_the_multiprocessors() {
        let device = device(132, (9, 0), 227);
        let mut products = product(1, 8192, 8192, 128);
        products.matrices.extend([matrix(1000), matrix(1024)]);
        let plan = products.plan(&device);
        assert_eq!((plan.grid, plan.counters), ([128, 1, 1], 40));
        let launch = products.launch(&plan, 0, 0).unwrap();
        let numbers = |index: usize| launch.arguments[10 + 7 * index + 5..][..2].to_vec();
        let words = |values: [u32; 2]| values.map(Argument::U32).to_vec();
        assert_eq!(numbers(0), words([8192, 0]));
        assert_eq!(numbers(1), words([1000, 32]));
        assert_eq!(numbers(2), words([1024, 36]));
    }

    #[test]
    fn weights_are_read_by_all_multiprocessors_and_once() {
        let device = device(108, (8, 0), 163);
        for rows in [1, 16, 64, 128] {
            let plan = product(rows, 8192, 28672, 128).plan(&device);
            assert!((105..=108).contains(&plan.grid[0]) && plan.grid[1] == 1, "{plan:?}");
        }
        let large = product(2048, 8192, 8192, 128).plan(&device);
        assert_eq!((large.kernel, large.grid), ("w4a16_tiles_128", [108, 1, 1]));
    }
}
