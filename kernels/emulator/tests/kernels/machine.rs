//! The emulator itself: what instructions do, and that faults are found.

use half::f16;
use nibble_kernel_emulator::{Emulator, Report};
use nibble_kernels::device::cuda::Element;
use nibble_kernels::device::cuda::driver::{Address, Argument, Driver, Launch, Source};

use crate::lab::{ELEMENTS, random, random_words};

const SOURCE: Source = Source { name: "machine", variant: "", text: include_str!("machine.cu") };
const WARPGROUP: Source = Source { name: "warpgroup", variant: "", text: include_str!("warpgroup.cu") };

/// A value's bytes on the device, given back when dropped.
struct Bytes<'a> {
    emulator: &'a Emulator,
    address: Address,
    length: usize,
}

impl<'a> Bytes<'a> {
    fn with(emulator: &'a Emulator, bytes: &[u8]) -> Self {
        let address = emulator.allocate(bytes.len()).unwrap();
        emulator.write(bytes, address).unwrap();
        Self { emulator, address, length: bytes.len() }
    }

    fn words(emulator: &'a Emulator, words: &[u32]) -> Self {
        Self::with(emulator, &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
    }

    fn halves(emulator: &'a Emulator, halves: &[u16]) -> Self {
        Self::with(emulator, &halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<_>>())
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        self.emulator.read(self.address, &mut bytes).unwrap();
        bytes
    }

    fn read_words(&self) -> Vec<u32> {
        self.read().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    fn read_halves(&self) -> Vec<u16> {
        self.read().chunks_exact(2).map(|half| u16::from_le_bytes(half.try_into().unwrap())).collect()
    }

    fn argument(&self) -> Argument {
        Argument::Address(self.address)
    }
}

impl Drop for Bytes<'_> {
    fn drop(&mut self) {
        self.emulator.free(self.address, self.length);
    }
}

fn run(
    emulator: &Emulator,
    kernel: &'static str,
    shape: (u32, u32),
    shared_bytes: u32,
    arguments: &[Argument],
) -> Result<Report, String> {
    run_source(SOURCE, emulator, kernel, shape, shared_bytes, arguments)
}

fn run_source(
    source: Source,
    emulator: &Emulator,
    kernel: &'static str,
    (blocks, threads): (u32, u32),
    shared_bytes: u32,
    arguments: &[Argument],
) -> Result<Report, String> {
    let arguments = arguments.iter().copied().collect();
    let launch = Launch { source, kernel, grid: [blocks, 1, 1], block: threads, shared_bytes, arguments };
    emulator.launch(&launch).map_err(|error| error.to_string())?;
    Ok(emulator.report())
}

fn kernel_of(element: Element, kernels: [&'static str; 2]) -> &'static str {
    kernels[usize::from(element == Element::BF16)]
}

#[test]
fn a_product_of_tiles_is_the_product() {
    let emulator = Emulator::new(1);
    for element in ELEMENTS {
        let (a, b) = (random(element, 256, 1, 1.0), random(element, 128, 2, 1.0));
        let halves = |values: &[f32]| values.iter().map(|&value| element.round(value)).collect::<Vec<_>>();
        let (a_bytes, b_bytes) =
            (Bytes::halves(&emulator, &halves(&a)), Bytes::halves(&emulator, &halves(&b)));
        let products = Bytes::words(&emulator, &[u32::MAX; 128]);
        let kernel = kernel_of(element, ["product_f16", "product_bf16"]);
        let arguments = [a_bytes.argument(), b_bytes.argument(), products.argument()];
        let report = run(&emulator, kernel, (1, 32), 768, &arguments).unwrap();
        for (index, found) in products.read_words().into_iter().enumerate() {
            let (row, column) = (index / 8, index % 8);
            let expected: f32 = (0..16).map(|k| a[row * 16 + k] * b[column * 16 + k]).sum();
            assert!((f32::from_bits(found) - expected).abs() < 1e-5, "{element} {row} {column}");
        }
        assert_eq!((report.matrix_products, report.async_copies, report.async_bytes), (2, 48, 768));
        assert!(report.matrix_conflict_cycles > 0, "rows of 32 bytes lie in few banks: {report:?}");
    }
}

#[test]
fn a_product_of_a_warpgroup_is_the_product_unless_something_is_forgotten() {
    let emulator = Emulator::hopper(1);
    for element in ELEMENTS {
        let (a, b) = (random(element, 64 * 64, 1, 1.0), random(element, 32 * 64, 2, 1.0));
        let halves = |values: &[f32]| values.iter().map(|&value| element.round(value)).collect::<Vec<_>>();
        let (a_bytes, b_bytes) =
            (Bytes::halves(&emulator, &halves(&a)), Bytes::halves(&emulator, &halves(&b)));
        let kernel = kernel_of(element, ["warpgroup_f16", "warpgroup_bf16"]);
        let outcome = |fault| {
            let products = Bytes::words(&emulator, &[u32::MAX; 64 * 32]);
            let arguments =
                [a_bytes.argument(), b_bytes.argument(), products.argument(), Argument::U32(fault)];
            run_source(WARPGROUP, &emulator, kernel, (1, 128), 4096, &arguments)?;
            let wrong = products.read_words().into_iter().enumerate().filter(|&(index, found)| {
                let (row, column) = (index / 32, index % 32);
                let expected: f32 = (0..64).map(|k| a[row * 64 + k] * b[column * 64 + k]).sum();
                let error = (f32::from_bits(found) - expected).abs();
                error > 1e-4 || error.is_nan()
            });
            Ok::<_, String>(wrong.count())
        };
        assert_eq!(outcome(0), Ok(0), "{element}");
        assert!(outcome(1).unwrap_err().contains("no shared_proxy_fence"));
        assert_eq!(outcome(2), Ok(64 * 32), "without a wait all sums are NaN");
        assert!(outcome(3).unwrap_err().contains("while a product read them"));
        assert!(outcome(4).unwrap() > 0, "registers are read as late as the wait");
        assert!(outcome(5).unwrap_err().contains("no warpgroup_fence"));
        assert!(outcome(6).unwrap_err().contains("race in shared memory"));
    }
}

#[test]
fn a_transposed_load_transposes_each_matrix() {
    let emulator = Emulator::new(1);
    let input: Vec<u16> = (0..256).collect();
    let (from, to) = (Bytes::halves(&emulator, &input), Bytes::words(&emulator, &[0; 128]));
    let report = run(&emulator, "transpose", (1, 32), 512, &[from.argument(), to.argument()]).unwrap();
    let found = to.read_halves();
    for (matrix, row, column) in (0..256).map(|index| (index / 64, index / 8 % 8, index % 8)) {
        assert_eq!(found[matrix * 64 + row * 8 + column], input[matrix * 64 + column * 8 + row]);
    }
    assert_eq!((report.matrix_load_cycles, report.matrix_conflict_cycles), (4, 0));
}

#[test]
fn shuffles_read_other_lanes_of_the_same_warp() {
    let emulator = Emulator::new(3);
    let output = Bytes::words(&emulator, &[0; 128]);
    run(&emulator, "shuffles", (1, 64), 0, &[output.argument()]).unwrap();
    let found = output.read_words();
    for index in 0..64 {
        assert_eq!((found[index], found[64 + index]), (index as u32 ^ 5, index as u32 / 32 * 32 + 3));
    }
}

#[test]
fn bits_are_combined_and_bytes_picked_as_the_tables_say() {
    let emulator = Emulator::new(1);
    let (a, b, c) = (0x0123_4567, 0x89ab_cdef, 0x5a5a_3c3c);
    let (input, output) = (Bytes::words(&emulator, &[a, b, c]), Bytes::words(&emulator, &[0; 4]));
    run(&emulator, "bits", (1, 1), 0, &[input.argument(), output.argument()]).unwrap();
    assert_eq!(output.read_words(), [(a & b) ^ c, a | (b & c), 0x89cd_0145, 0x6723_efab]);
}

#[test]
fn floats_are_rounded_to_the_nearest_even_element() {
    let emulator = Emulator::new(1);
    // Every element, what lies half way to the next, and a little more and less than that.
    let mut values: Vec<u32> = (0..=u16::MAX)
        .flat_map(|bits| {
            let (half, wide) = (f16::from_bits(bits).to_f32().to_bits(), u32::from(bits) << 16);
            [half, half + 0x1000, half + 0x1001, half + 0xfff, wide + 0x8000, wide + 0x8001, wide + 0x7fff]
        })
        .collect();
    values.retain(|&bits| !f32::from_bits(bits).is_nan());
    values.truncate(values.len() / 32 * 32);
    let (input, output) =
        (Bytes::words(&emulator, &values), Bytes::halves(&emulator, &vec![0; values.len()]));
    for element in ELEMENTS {
        let kernel = kernel_of(element, ["rounded_f16", "rounded_bf16"]);
        let blocks = values.len() as u32 / 32;
        run(&emulator, kernel, (blocks, 32), 0, &[input.argument(), output.argument()]).unwrap();
        for (&value, found) in values.iter().zip(output.read_halves()) {
            assert_eq!(found, element.round(f32::from_bits(value)), "{element} {value:#x}");
        }
    }
}

#[test]
fn pairs_are_added_and_multiplied_with_one_rounding() {
    let emulator = Emulator::new(1);
    let count = 1024;
    for element in ELEMENTS {
        let words: Vec<u32> = random_words(3 * count * 2, 9, 0x7000)
            .chunks_exact(2)
            .map(|pair| (pair[0] * 2 % 0x7000) | ((pair[1] * 2 % 0x7000) | 0x8000) << 16)
            .collect();
        let (input, output) = (Bytes::words(&emulator, &words), Bytes::words(&emulator, &vec![0; 3 * count]));
        let kernel = kernel_of(element, ["arithmetic_f16", "arithmetic_bf16"]);
        let arguments = [input.argument(), output.argument(), Argument::U32(count as u32)];
        run(&emulator, kernel, (1, count as u32), 0, &arguments).unwrap();
        let (input, found) = (input.read_halves(), output.read_halves());
        // `half` rounds a double by its upper 32 bits: of its answer and the neighbours, the nearest, even when two are.
        let rounded = |exact: f64| {
            let near = element.round(exact as f32);
            if element.widen(near).is_infinite() {
                return near;
            }
            let distance = |bits: &u16| (f64::from(element.widen(*bits)) - exact).abs();
            let candidates = [near - near % 2, near, near + near % 2, near - 1, near + 1];
            let nearest = candidates.iter().map(distance).fold(f64::INFINITY, f64::min);
            candidates.into_iter().find(|bits| distance(bits) == nearest).unwrap()
        };
        for index in 0..2 * count {
            let [a, b, c] = [0, 1, 2].map(|part| f64::from(element.widen(input[part * 2 * count + index])));
            let expected = [rounded(a + b), rounded(a * b), rounded(a * b + c)];
            let found = [0, 1, 2].map(|part| found[part * 2 * count + index]);
            assert_eq!(found, expected, "{element} {a} {b} {c}");
        }
    }
}

#[test]
fn the_last_block_to_come_sees_what_the_others_wrote() {
    for seed in 0..5 {
        let emulator = Emulator::new(seed);
        let (partial, counter) = (Bytes::words(&emulator, &[u32::MAX; 9]), Bytes::words(&emulator, &[0]));
        let total = Bytes::words(&emulator, &[0]);
        let arguments = [partial.argument(), counter.argument(), total.argument()];
        run(&emulator, "last_block", (9, 32), 0, &arguments).unwrap();
        assert_eq!(total.read_words(), [36]);
    }
}

#[test]
fn what_a_block_wrote_is_anothers_only_after_a_fence_and_an_atomic() {
    let emulator = Emulator::new(1);
    let words = || Bytes::words(&emulator, &[0; 2]);
    let forgotten = ["no device_fence and atomic", "no device_fence and atomic", "first-level cache", ""];
    for (step, message) in forgotten.into_iter().enumerate() {
        let (partial, counter, total) = (words(), words(), words());
        let arguments =
            [partial.argument(), counter.argument(), total.argument(), Argument::U32(step as u32)];
        match run(&emulator, "last_block_without", (2, 32), 0, &arguments) {
            Ok(_) => assert_eq!(message, "", "step {step} was not missed"),
            Err(error) => assert!(!message.is_empty() && error.contains(message), "step {step}: {error}"),
        }
    }
    let memory = Bytes::words(&emulator, &[0; 64]);
    let error = run(&emulator, "faulty", (2, 64), 256, &[memory.argument(), Argument::U32(16)]).unwrap_err();
    assert!(error.contains("no device_fence and atomic"), "{error}");
}

#[test]
fn arguments_of_all_kinds_arrive_in_order() {
    let emulator = Emulator::new(1);
    let output = Bytes::words(&emulator, &[0; 16]);
    let kinds = "ufuuuuuffffffffu";
    let values = kinds.chars().enumerate().map(|(index, kind)| match kind {
        'u' => Argument::U32(index as u32),
        _ => Argument::F32(index as f32),
    });
    let arguments: Vec<_> = [output.argument()].into_iter().chain(values).collect();
    run(&emulator, "many_arguments", (1, 32), 0, &arguments).unwrap();
    let found: Vec<f32> = output.read_words().into_iter().map(f32::from_bits).collect();
    assert_eq!(found, (0..16).map(|index| index as f32).collect::<Vec<_>>());
}

#[test]
fn bank_conflicts_are_counted() {
    let emulator = Emulator::new(1);
    // Eight lanes of 16 bytes are served at once: side by side without conflicts, all in one bank group with seven.
    for (stride, conflicts) in [(1, 0), (2, 4), (3, 0), (8, 28)] {
        let output = Bytes::words(&emulator, &[0; 32]);
        let arguments = [output.argument(), Argument::U32(stride)];
        let report = run(&emulator, "strided", (1, 32), 32 * 16 * stride, &arguments).unwrap();
        assert_eq!(report.shared_conflict_cycles, conflicts, "stride {stride}");
        assert_eq!(report.shared_cycles, 4 * u64::from(stride) + 4, "stride {stride}");
    }
}

#[test]
fn sectors_of_global_memory_are_counted() {
    let emulator = Emulator::new(1);
    // Words side by side fill their sectors; words a sector apart take one each; one word for all takes one.
    for (stride, sectors, full) in [(1, 4, 4), (8, 32, 4), (0, 1, 1), (12, 32, 4)] {
        let (input, output) = (Bytes::words(&emulator, &[7; 512]), Bytes::words(&emulator, &[0; 32]));
        let arguments = [input.argument(), output.argument(), Argument::U32(stride)];
        let report = run(&emulator, "scattered", (1, 32), 0, &arguments).unwrap();
        // The output's four sectors are full.
        assert_eq!((report.global_sectors, report.global_full_sectors), (sectors + 4, full + 4), "{stride}");
    }
}

#[test]
fn every_fault_is_named_whatever_the_order() {
    let faults = [
        (0, ""),
        (1, "race in shared memory"),
        (2, "race in shared memory"),
        (3, "loads 4 bytes at offset 256 of shared memory, which has 256"),
        (4, "stores 4 bytes at address"),
        (5, "not a multiple of 8"),
        (6, "the warp has diverged"),
        (7, "threads of the block have ended"),
        (8, "has started an asynchronous copy"),
        (9, "has started an asynchronous copy"),
        (10, "outside of device memory"),
        (11, "the block does not end"),
        (12, "race in shared memory"),
        (13, "race in global memory"),
        (14, "race in global memory"),
        (15, "race in global memory"),
        (16, ""),
        (17, "loads 4 bytes at address"),
        (18, "before wait_for_previous_kernel"),
    ];
    for (fault, message) in faults {
        for seed in 0..3 {
            if fault == 11 && seed > 0 {
                continue;
            }
            let emulator = Emulator::new(seed);
            let memory = Bytes::words(&emulator, &[0; 64]);
            let arguments = [memory.argument(), Argument::U32(fault)];
            match run(&emulator, "faulty", (1, 64), 256, &arguments) {
                Ok(_) => assert_eq!(message, "", "fault {fault} was not found"),
                Err(error) => {
                    assert!(!message.is_empty() && error.contains(message), "fault {fault}: {error}");
                }
            }
        }
    }
}

#[test]
fn a_launch_that_no_card_would_take_is_refused() {
    let emulator = Emulator::new(1);
    let refused = [
        ((1, 2048), 0, "1024 threads"),
        ((0, 32), 0, "at least one block"),
        ((1, 32), 200_000, "shared memory"),
    ];
    for (shape, shared_bytes, message) in refused {
        let error = run(&emulator, "shuffles", shape, shared_bytes, &[]).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let error = run(&emulator, "nothing", (1, 32), 0, &[]).unwrap_err();
    assert!(error.contains("has no kernel nothing"), "{error}");
    let wrong = Source { name: "wrong", variant: "", text: "#include \"common.cuh\"\nint" };
    let launch = Launch {
        source: wrong,
        kernel: "none",
        grid: [1; 3],
        block: 32,
        shared_bytes: 0,
        arguments: Default::default(),
    };
    let error = emulator.launch(&launch).unwrap_err().to_string();
    assert!(error.contains("cannot compile wrong") && error.contains("kernel.cu:2"), "{error}");
}
