//! What the suites of all kernels share: devices to run on, poisoned buffers, comparisons.
//!
//! A suite is a list of cases and a list of faults. The cases are run on the kernel as it is (each is a `#[test]`) and,
//! by `mutations.rs`, on the kernel with each of the faults, of which at least one case must find out.

use std::sync::Arc;

use nibble_kernel_emulator::Emulator;
use nibble_kernel_emulator::mutations::Mutation;
use nibble_kernels::backend::{Device, Length};
use nibble_kernels::device::cuda::driver::{Driver, Source};
use nibble_kernels::device::cuda::{Cuda, CudaBuffer, CudaDenseMatrix, CudaIndices, Element};
use nibble_kernels::tensor::{DenseMatrix, DenseValues};

/// `Ok`, or what was wrong.
pub(crate) type Outcome = Result<(), String>;

/// A test that can be run with a fault in the kernel.
pub(crate) type Case = fn(&Lab) -> Outcome;

/// One kernel's tests.
pub(crate) struct Suite {
    /// Its source.
    pub(crate) source: Source,
    /// Name and test.
    pub(crate) cases: &'static [(&'static str, Case)],
    /// Faults that the cases must find.
    pub(crate) faults: &'static [Mutation],
}

/// Makes devices, all with the same fault or all without.
#[derive(Default)]
pub(crate) struct Lab {
    fault: Option<Mutation>,
}

impl Lab {
    /// Kernels as they are.
    pub(crate) fn sound() -> Self {
        Self::default()
    }

    /// A kernel with a fault.
    pub(crate) fn faulty(fault: Mutation) -> Self {
        Self { fault: Some(fault) }
    }

    /// A device of its own; `seed` decides the order of blocks, warps and lanes.
    pub(crate) fn device(&self, element: Element, seed: u64) -> TestDevice {
        self.device_on(Emulator::new(seed), element)
    }

    /// One with another number of multiprocessors, for launches that choose their grid by it.
    pub(crate) fn device_of_size(&self, element: Element, seed: u64, multiprocessors: u32) -> TestDevice {
        self.device_on(Emulator::new(seed).with_multiprocessors(multiprocessors), element)
    }

    /// The emulator of [`Self::device`].
    pub(crate) fn emulator(&self, seed: u64) -> Emulator {
        self.with_fault(Emulator::new(seed))
    }

    /// A device on another kind of emulator, as [`Emulator::hopper`].
    pub(crate) fn device_on(&self, emulator: Emulator, element: Element) -> TestDevice {
        let emulator = Arc::new(self.with_fault(emulator));
        let driver: Arc<dyn Driver> = emulator.clone();
        let cuda = Cuda::new(driver, element).expect("there is memory for a test");
        TestDevice { emulator, cuda }
    }

    fn with_fault(&self, emulator: Emulator) -> Emulator {
        match self.fault {
            Some(fault) => emulator.with_mutation(fault),
            None => emulator,
        }
    }
}

/// A CUDA device on an emulator.
pub(crate) struct TestDevice {
    /// For its reports.
    pub(crate) emulator: Arc<Emulator>,
    /// For its operations.
    pub(crate) cuda: Cuda,
}

impl TestDevice {
    /// A buffer with `values`, rounded.
    pub(crate) fn upload(&self, values: &[f32]) -> CudaBuffer {
        let mut buffer = self.cuda.buffer(values.len()).expect("there is memory for a test");
        self.cuda.write(values, &mut buffer).expect("the buffer was made for these values");
        buffer
    }

    /// A buffer full of NaN, to be written by an operation.
    pub(crate) fn poisoned(&self, elements: usize) -> CudaBuffer {
        self.upload(&vec![f32::NAN; elements])
    }

    /// Words.
    pub(crate) fn words(&self, values: &[u32]) -> CudaIndices {
        let mut words = self.cuda.indices(values.len()).expect("there is memory for a test");
        self.cuda.write_indices(values, &mut words).expect("they were made for these values");
        words
    }

    /// A dense matrix with `values`, rounded.
    pub(crate) fn matrix(&self, out_features: usize, in_features: usize, values: &[f32]) -> CudaDenseMatrix {
        let values = DenseValues::F32(values.into());
        let matrix = DenseMatrix::new(out_features, in_features, values).expect("the shape is right");
        self.cuda.pack_dense("matrix", &matrix).expect("there is memory for a test")
    }

    /// All elements of a buffer.
    pub(crate) fn download(&self, buffer: &CudaBuffer) -> Vec<f32> {
        let mut values = vec![0.0; buffer.length()];
        self.cuda.read(buffer, 0..values.len(), &mut values).expect("the range is the buffer's");
        values
    }
}

/// Both element types.
pub(crate) const ELEMENTS: [Element; 2] = [Element::F16, Element::BF16];

/// `count` reproducible values of `element` in -scale..scale.
pub(crate) fn random(element: Element, count: usize, seed: u64, scale: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let values = (0..count).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * scale
    });
    values.map(|value| round(element, value)).collect()
}

/// `count` reproducible numbers below `below`.
pub(crate) fn random_words(count: usize, seed: u64, below: u32) -> Vec<u32> {
    let unit = random(Element::F16, count, seed, 1.0);
    unit.iter().map(|value| ((value + 1.0) / 2.0 * below as f32) as u32 % below).collect()
}

/// The nearest value of `element`.
pub(crate) fn round(element: Element, value: f32) -> f32 {
    element.widen(element.round(value))
}

/// Half the distance between neighbours of `element` near `value`.
pub(crate) fn half_step(element: Element, value: f64) -> f64 {
    let (digits, smallest) = match element {
        Element::F16 => (11, -14),
        Element::BF16 => (8, -126),
    };
    let exponent = if value == 0.0 { smallest } else { (value.abs().log2().floor() as i32).max(smallest) };
    2f64.powi(exponent - digits)
}

/// Whether each value is the rounding of one that is at most `allowed(index)` away from the expected one.
pub(crate) fn check_rounded(
    what: &str,
    element: Element,
    found: &[f32],
    expected: &[f64],
    allowed: impl Fn(usize) -> f64,
) -> Outcome {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values, expected {}", found.len(), expected.len()));
    }
    for (index, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(found) - expected).abs();
        let limit = half_step(element, expected) * 1.001 + allowed(index);
        if error > limit || error.is_nan() {
            return Err(format!(
                "{what}, {element}: [{index}] is {found}, expected {expected} within {limit:e}"
            ));
        }
    }
    Ok(())
}

/// Whether both have the same bits.
pub(crate) fn check_same_bits(what: &str, found: &[f32], expected: &[f32]) -> Outcome {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values, expected {}", found.len(), expected.len()));
    }
    let pairs = found.iter().zip(expected);
    match pairs.map(|(a, b)| (a.to_bits(), b.to_bits())).position(|(a, b)| a != b) {
        Some(index) => Err(format!("{what}: [{index}] is {}, expected {}", found[index], expected[index])),
        None => Ok(()),
    }
}

/// `Ok` when `condition`.
pub(crate) fn check(condition: bool, message: impl FnOnce() -> String) -> Outcome {
    if condition { Ok(()) } else { Err(message()) }
}
