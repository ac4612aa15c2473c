//! Attention on CUDA: which kernel, which grid, and whether a block takes all splits of its keys or one.
//!
//! None of these choices changes a bit of the result: `kernel.cu` says why. They only keep the device busy: a step with
//! few blocks of columns deals their keys to more blocks, a split of 512 keys each, and a second kernel merges.

use arrayvec::ArrayVec;

use super::{Args, PagedAttention};
use crate::device::cuda::driver::{Address, Argument, Launch, Properties, Source};
use crate::device::cuda::{Cuda, CudaBuffer, CudaIndices, Element, WORKSPACE_BYTES};
use crate::error::KernelError;
use crate::ops::word;

const NAME: &str = "paged_attention";

/// Keys of a split and of a tile: the constants `SPLIT` and `TILE` of `kernel.cu`.
const SPLIT: usize = 512;
const TILE: usize = 64;

/// Blocks to a multiprocessor below which splits are dealt to blocks of their own.
const FEW_BLOCKS: usize = 2;

/// A block's columns (query rows times heads of a KV head), and its warps.
const COLUMNS: [BlockSize; 3] = [
    BlockSize { columns: 8, fragments: 1, groups: 1 },
    BlockSize { columns: 32, fragments: 4, groups: 1 },
    BlockSize { columns: 64, fragments: 4, groups: 2 },
];

/// `columns = 8 * fragments * groups`, as the kernel's template parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BlockSize {
    columns: usize,
    fragments: usize,
    groups: usize,
}

impl BlockSize {
    fn threads(self) -> usize {
        128 * self.groups
    }

    /// Shared memory of a block: tiles of keys and values, queries, weights, maxima and sums, as `kernel.cu` lays it out.
    fn shared_bytes(self, head_dim: usize) -> usize {
        let row = 2 * head_dim + 16;
        let stages = match head_dim {
            256.. => 1,
            ..=64 => 4,
            _ => 256 / head_dim,
        };
        let weights = self.groups * TILE * 16 * (self.fragments | 1);
        let maxima_and_sums = 2 * 4 * 4 * self.columns;
        2 * stages * TILE * row + self.columns * row + weights + maxima_and_sums
    }
}

/// The kernels of one head size and element: they are compiled alone, as a model has one of each.
#[derive(Clone, Copy, Debug)]
struct Kernels {
    head_dim: usize,
    element: Element,
    source: Source,
    /// For each of [`COLUMNS`].
    attention: [&'static str; 3],
    combine: &'static str,
}

macro_rules! kernels {
    ($head_dim:literal, $element:ident, $name:literal) => {
        Kernels {
            head_dim: $head_dim,
            element: Element::$element,
            source: Source {
                name: NAME,
                variant: concat!($name, "-", $head_dim),
                text: concat!(
                    "#define NIBBLE_HEAD_DIM ", $head_dim, "\n",
                    "#define NIBBLE_ELEMENT ", stringify!($element), "\n",
                    "#define NIBBLE_ELEMENT_NAME ", $name, "\n",
                    include_str!("kernel.cu")
                ),
            },
            attention: [
                concat!("paged_attention_", $name, "_", $head_dim, "_8"),
                concat!("paged_attention_", $name, "_", $head_dim, "_32"),
                concat!("paged_attention_", $name, "_", $head_dim, "_64"),
            ],
            combine: concat!("paged_attention_combine_", $name, "_", $head_dim),
        }
    };
    ($($head_dim:literal)*) => {
        [$(kernels!($head_dim, F16, "f16"), kernels!($head_dim, BF16, "bf16")),*]
    };
}
const KERNELS: [Kernels; 18] = kernels!(16 32 64 80 96 112 128 160 256);

/// The kernels of every head size and element that there are kernels for.
pub const SOURCES: [Source; KERNELS.len()] = {
    let mut sources = [KERNELS[0].source; KERNELS.len()];
    let mut index = 0;
    while index < KERNELS.len() {
        sources[index] = KERNELS[index].source;
        index += 1;
    }
    sources
};

fn kernels(head_dim: usize, element: Element) -> Result<&'static Kernels, KernelError> {
    const REQUIREMENT: &str = "has no CUDA kernel: 16, 32, 64, 80, 96, 112, 128, 160 and 256 have";
    let kernels = KERNELS.iter().find(|kernels| kernels.head_dim == head_dim && kernels.element == element);
    kernels.ok_or_else(|| KernelError::Value {
        operation: NAME,
        argument: "head_dim",
        found: head_dim.to_string(),
        requirement: REQUIREMENT,
    })
}

/// The sizes of [`Args`].
#[derive(Clone, Copy, Debug)]
struct Shape {
    sequence_count: usize,
    rows: usize,
    longest: usize,
    longest_rows: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: usize,
}

/// Where everything lies.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    query: Address,
    key_cache: Address,
    value_cache: Address,
    sequences: Address,
    block_tables: Address,
    output: Address,
    workspace: Address,
}

/// How a step is dealt to blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Plan {
    /// Index in [`COLUMNS`].
    size: usize,
    /// Blocks of columns, to each KV head.
    column_blocks: usize,
    /// Splits, each taken by a block of its own; 1 where a block takes all.
    splits: usize,
}

impl Shape {
    fn heads_per_kv_head(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Most splits that hold keys of one block of columns.
    fn splits(&self, columns: usize) -> usize {
        let all = self.longest.div_ceil(SPLIT);
        // A block's rows see at most these keys, which start anywhere in a split.
        let rows = (columns / self.heads_per_kv_head() + 2).min(self.longest_rows);
        let seen = self.window.saturating_add(rows - 1).min(self.longest);
        all.min((seen - 1).div_ceil(SPLIT) + 1)
    }

    /// Bytes of workspace for `splits` splits: results `[split, row, head, head_dim]`, then maxima and sums.
    fn workspace_bytes(&self, splits: usize) -> usize {
        4 * self.partials(splits) * (self.head_dim + 2)
    }

    fn partials(&self, splits: usize) -> usize {
        splits * self.rows * self.heads
    }
}

/// The smallest block that takes all columns of any sequence, or the largest that the device has shared memory for.
fn plan(shape: &Shape, properties: &Properties) -> Result<Plan, KernelError> {
    let widest = shape.longest_rows * shape.heads_per_kv_head();
    let fits =
        |size: &BlockSize| size.shared_bytes(shape.head_dim) <= properties.shared_bytes_per_block as usize;
    let possible = COLUMNS.iter().take_while(|size| fits(size)).count();
    let requirement = "needs more shared memory than this card has";
    KernelError::require(possible > 0, NAME, "head_dim", shape.head_dim, requirement)?;
    let enough = COLUMNS.iter().position(|size| size.columns >= widest).unwrap_or(COLUMNS.len() - 1);
    let size = enough.min(possible - 1);
    let columns = COLUMNS[size].columns;
    let column_blocks = if widest <= columns {
        shape.sequence_count
    } else {
        // The kernel deals these to the sequences, each rounded up; what is left over has nothing to do.
        shape.rows * shape.heads_per_kv_head() / columns + shape.sequence_count
    };
    let splits = shape.splits(columns);
    let few = column_blocks * shape.kv_heads < FEW_BLOCKS * properties.multiprocessors as usize;
    let fits = shape.workspace_bytes(splits) <= WORKSPACE_BYTES;
    Ok(Plan { size, column_blocks, splits: if few && fits { splits } else { 1 } })
}

/// The launches of one call: attention, and the merge of splits where there are several.
fn launches(
    shape: &Shape,
    plan: Plan,
    element: Element,
    addresses: &Addresses,
) -> Result<ArrayVec<Launch, 2>, KernelError> {
    let &Kernels { source, attention, combine, .. } = kernels(shape.head_dim, element)?;
    let mut launches = ArrayVec::new();
    let size = COLUMNS[plan.size];
    let count = |argument, count| word(NAME, argument, count).map(Argument::U32);
    let statistics = addresses.workspace + 4 * (shape.partials(plan.splits) * shape.head_dim) as Address;
    let window = Argument::U32(u32::try_from(shape.window).unwrap_or(u32::MAX));
    let score_scale = std::f32::consts::LOG2_E / (shape.head_dim as f32).sqrt();
    launches.push(Launch {
        source,
        kernel: attention[plan.size],
        grid: [plan.column_blocks, shape.kv_heads, plan.splits].map(|size| size as u32),
        block: size.threads() as u32,
        shared_bytes: size.shared_bytes(shape.head_dim) as u32,
        arguments: [
            Argument::Address(addresses.query),
            Argument::Address(addresses.key_cache),
            Argument::Address(addresses.value_cache),
            Argument::Address(addresses.sequences),
            Argument::Address(addresses.block_tables),
            Argument::Address(addresses.output),
            Argument::Address(addresses.workspace),
            Argument::Address(statistics),
            count("rows", shape.rows)?,
            count("sequence_count", shape.sequence_count)?,
            count("heads", shape.heads)?,
            count("kv_heads", shape.kv_heads)?,
            window,
            Argument::F32(score_scale),
        ]
        .into_iter()
        .collect(),
    });
    if plan.splits > 1 {
        launches.push(Launch {
            source,
            kernel: combine,
            grid: [plan.column_blocks as u32, shape.kv_heads as u32, 1],
            block: 256,
            shared_bytes: 0,
            arguments: [
                Argument::Address(addresses.workspace),
                Argument::Address(statistics),
                Argument::Address(addresses.sequences),
                Argument::Address(addresses.output),
                count("rows", shape.rows)?,
                count("sequence_count", shape.sequence_count)?,
                count("heads", shape.heads)?,
                count("kv_heads", shape.kv_heads)?,
                window,
                Argument::U32(size.columns as u32),
            ]
            .into_iter()
            .collect(),
        });
    }
    Ok(launches)
}

impl PagedAttention for Cuda {
    fn paged_attention(
        &self,
        args: Args<'_, CudaBuffer, CudaIndices, CudaBuffer>,
    ) -> Result<(), KernelError> {
        args.check()?;
        if args.rows == 0 {
            return Ok(());
        }
        let shape = Shape {
            sequence_count: args.sequence_count,
            rows: args.rows,
            longest: args.longest,
            longest_rows: args.longest_rows,
            heads: args.heads,
            kv_heads: args.kv_heads,
            head_dim: args.head_dim,
            window: args.window,
        };
        let plan = plan(&shape, self.properties())?;
        let addresses = Addresses {
            query: args.query.address(),
            key_cache: args.key_cache.address(),
            value_cache: args.value_cache.address(),
            sequences: args.sequences.address(),
            block_tables: args.block_tables.address(),
            output: args.output.address(),
            workspace: self.workspace(if plan.splits > 1 {
                shape.workspace_bytes(plan.splits)
            } else {
                0
            })?,
        };
        for launch in launches(&shape, plan, self.element(), &addresses)? {
            self.submit(&launch)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A100: u32 = 108;

    fn properties(multiprocessors: u32, shared_bytes_per_block: u32) -> Properties {
        Properties {
            name: "test".to_owned(),
            compute_capability: (8, 0),
            multiprocessors,
            shared_bytes_per_block,
        }
    }

    /// Heads of Llama 3 70B.
    fn decode(sequences: usize, longest: usize) -> Shape {
        Shape {
            sequence_count: sequences,
            rows: sequences,
            longest,
            longest_rows: 1,
            heads: 64,
            kv_heads: 8,
            head_dim: 128,
            window: usize::MAX,
        }
    }

    fn plan_of(shape: &Shape) -> (usize, usize, usize) {
        let plan = plan(shape, &properties(A100, 163 << 10)).unwrap();
        (COLUMNS[plan.size].columns, plan.column_blocks, plan.splits)
    }

    #[test]
    fn a_small_batch_is_dealt_by_splits_and_a_large_one_is_not() {
        assert_eq!(plan_of(&decode(1, 4096)), (8, 1, 8));
        assert_eq!(plan_of(&decode(1, 4097)), (8, 1, 9));
        assert_eq!(plan_of(&decode(1, 512)), (8, 1, 1));
        assert_eq!(plan_of(&decode(64, 1024)), (8, 64, 1));
    }

    #[test]
    fn a_window_bounds_the_splits() {
        let windowed = |window| Shape { window, ..decode(1, 1 << 17) };
        assert_eq!(plan_of(&windowed(1)), (8, 1, 1));
        assert_eq!(plan_of(&windowed(2)), (8, 1, 2));
        assert_eq!(plan_of(&windowed(513)), (8, 1, 2));
        assert_eq!(plan_of(&windowed(514)), (8, 1, 3));
        assert_eq!(plan_of(&windowed(usize::MAX)), (8, 1, 256));
    }

    #[test]
    fn a_prompt_takes_blocks_of_64_columns() {
        let prompt = Shape { rows: 2048, longest_rows: 2000, ..decode(49, 2048) };
        assert_eq!(plan_of(&prompt), (64, 2048 * 8 / 64 + 49, 1));
        let guesses = Shape { rows: 12, longest_rows: 4, ..decode(3, 100) };
        assert_eq!(plan_of(&guesses), (32, 3, 1));
    }

    #[test]
    fn a_workspace_that_is_too_small_means_no_splits() {
        let chunk = Shape { rows: 64, longest_rows: 64, ..decode(1, 1 << 15) };
        assert!(chunk.workspace_bytes(64) > WORKSPACE_BYTES);
        assert_eq!(plan_of(&chunk), (64, 9, 1));
        let shorter = Shape { longest: 4096, ..chunk };
        assert_eq!(plan_of(&shorter), (64, 9, 8));
    }

    #[test]
    fn blocks_fit_the_shared_memory_of_their_card() {
        // The occupancy that kernel.cu counts on: two blocks of a decode step to an A100's multiprocessor of 164 KiB,
        // where each block costs 1 KiB more.
        assert!(2 * (COLUMNS[0].shared_bytes(128) + 1024) <= 164 << 10);
        let small_card = properties(82, 99 << 10);
        for head_dim in KERNELS.map(|kernels| kernels.head_dim) {
            let shape = Shape { rows: 100, longest_rows: 100, head_dim, ..decode(1, 100) };
            let plan = plan(&shape, &small_card).unwrap();
            assert!(COLUMNS[plan.size].shared_bytes(head_dim) <= 99 << 10, "{head_dim}");
            assert!(plan.column_blocks * COLUMNS[plan.size].columns >= 800);
        }
        assert!(plan(&decode(1, 1), &properties(82, 16 << 10)).is_err());
    }

    #[test]
    fn launches_name_the_kernel_and_the_places_of_partial_results() {
        let addresses = Addresses {
            query: 1,
            key_cache: 2,
            value_cache: 3,
            sequences: 4,
            block_tables: 5,
            output: 6,
            workspace: 256,
        };
        let shape = decode(2, 1000);
        let plan = plan(&shape, &properties(A100, 163 << 10)).unwrap();
        let [attention, combine] =
            launches(&shape, plan, Element::BF16, &addresses).unwrap().into_inner().expect("two launches");
        assert_eq!((attention.kernel, attention.grid), ("paged_attention_bf16_128_8", [2, 8, 2]));
        assert_eq!((combine.kernel, combine.grid), ("paged_attention_combine_bf16_128", [2, 8, 1]));
        let statistics = Argument::Address(256 + 2 * 2 * 64 * 128 * 4);
        assert_eq!((attention.arguments[7], combine.arguments[1]), (statistics, statistics));
        assert!(attention.source.text.starts_with("#define NIBBLE_HEAD_DIM 128\n"));
        let odd = Shape { head_dim: 240, ..shape };
        assert!(launches(&odd, plan, Element::F16, &addresses).is_err());
    }
}
