use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use half::{bf16, f16};

use super::*;
use crate::backend::MatrixShape;
use crate::tensor::{DenseValues, GroupOffsets, QuantizedParts};

/// A driver with memory and no kernels.
#[derive(Debug)]
struct MemoryDriver {
    properties: Properties,
    /// Bytes by address; the next address is behind the highest one so far.
    memory: Mutex<(Address, BTreeMap<Address, Vec<u8>>)>,
    limit: usize,
}

impl MemoryDriver {
    fn new(limit: usize) -> Arc<Self> {
        let properties = Properties {
            name: "memory".to_owned(),
            compute_capability: (8, 0),
            multiprocessors: 1,
            shared_bytes_per_block: 0,
        };
        Arc::new(Self { properties, memory: Mutex::new((256, BTreeMap::new())), limit })
    }

    fn allocations(&self) -> usize {
        self.memory.lock().unwrap().1.len()
    }

    fn range<T>(&self, address: Address, bytes: usize, then: impl FnOnce(&mut [u8]) -> T) -> T {
        let memory = &mut self.memory.lock().unwrap().1;
        let (start, values) = memory.range_mut(..=address).next_back().expect("an allocation");
        let offset = (address - start) as usize;
        then(&mut values[offset..offset + bytes])
    }

    fn refuse(&self, action: &str) -> KernelError {
        KernelError::Device { device: "memory".to_owned(), action: action.to_owned(), reason: String::new() }
    }
}

impl Driver for MemoryDriver {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize) -> Result<Address, KernelError> {
        let (next, memory) = &mut *self.memory.lock().unwrap();
        if memory.values().map(Vec::len).sum::<usize>() + bytes > self.limit {
            return Err(self.refuse("allocate"));
        }
        let address = *next;
        *next += bytes.next_multiple_of(256) as Address;
        memory.insert(address, vec![0; bytes]);
        Ok(address)
    }

    fn free(&self, address: Address, bytes: usize) {
        let freed = self.memory.lock().unwrap().1.remove(&address).expect("what was allocated");
        assert_eq!(freed.len(), bytes);
    }

    fn write(&self, from: &[u8], to: Address) -> Result<(), KernelError> {
        self.range(to, from.len(), |bytes| bytes.copy_from_slice(from));
        Ok(())
    }

    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), KernelError> {
        self.range(from, to.len(), |bytes| to.copy_from_slice(bytes));
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), KernelError> {
        let values = self.range(from, bytes, |bytes| bytes.to_vec());
        self.write(&values, to)
    }

    fn launch(&self, _: &Launch) -> Result<(), KernelError> {
        Err(self.refuse("launch"))
    }

    fn synchronize(&self) -> Result<(), KernelError> {
        Ok(())
    }
}

const ROOM: usize = 128 << 20;

#[test]
fn values_come_back_rounded_to_the_nearest_element() {
    let values = [1.0, -2.5, 1.0 + 1.0 / 4096.0, 1.0 + 3.0 / 512.0, 70_000.0, f32::NEG_INFINITY];
    let halves = values.map(|value| f16::from_f32(value).to_f32());
    let brains = values.map(|value| bf16::from_f32(value).to_f32());
    assert_eq!((halves[4], brains[3]), (f32::INFINITY, 1.0078125));
    for (element, expected) in [(Element::F16, halves), (Element::BF16, brains)] {
        let device = Cuda::new(MemoryDriver::new(ROOM), element).unwrap();
        let mut buffer = device.buffer(8).unwrap();
        device.write(&values, &mut buffer).unwrap();
        let mut read = [9.0; 5];
        device.read(&buffer, 3..8, &mut read).unwrap();
        assert_eq!(read, [expected[3], expected[4], expected[5], 0.0, 0.0]);
        assert!(device.write(&[0.0; 9], &mut buffer).is_err());
        assert!(device.read(&buffer, 4..9, &mut read).is_err());
    }
}

#[test]
fn a_read_that_several_threads_convert_is_whole() {
    let device = Cuda::new(MemoryDriver::new(ROOM), Element::BF16).unwrap();
    let values: Vec<f32> = (0..1_000_003).map(|index| (index % 256) as f32).collect();
    let mut buffer = device.buffer(values.len()).unwrap();
    device.write(&values, &mut buffer).unwrap();
    let mut read = vec![0.0; values.len() - 1];
    device.read(&buffer, 1..values.len(), &mut read).unwrap();
    assert_eq!(read, values[1..]);
    device.read(&buffer, 0..0, &mut []).unwrap();
}

#[test]
fn memory_is_given_back_and_too_little_of_it_is_an_error() {
    let driver = MemoryDriver::new(ROOM);
    let device = Cuda::new(driver.clone(), Element::F16).unwrap();
    let before = driver.allocations();
    let buffers = (device.buffer(100).unwrap(), device.indices(100).unwrap(), device.buffer(0).unwrap());
    assert_eq!((driver.allocations(), buffers.2.address()), (before + 2, 0));
    drop(buffers);
    assert_eq!(driver.allocations(), before);
    assert!(device.buffer(ROOM).is_err());
    assert!(device.workspace(WORKSPACE_BYTES).is_ok() && device.workspace(WORKSPACE_BYTES + 1).is_err());
    assert!(device.counters(COUNTERS).is_ok() && device.counters(COUNTERS + 1).is_err());
    drop(device);
    assert_eq!(driver.allocations(), 0);
}

#[test]
fn dense_weights_are_stored_in_the_type_of_the_device() {
    let values = [1.0, 70_000.0, -0.25, 3.0, 0.0, 8.5];
    let device = Cuda::new(MemoryDriver::new(ROOM), Element::BF16).unwrap();
    let brains: Vec<bf16> = values.map(bf16::from_f32).to_vec();
    for values in [DenseValues::F32(values.to_vec().into()), DenseValues::BF16(brains.clone().into())] {
        let packed = device.pack_dense("weight", &DenseMatrix::new(2, 3, values).unwrap()).unwrap();
        assert_eq!((packed.out_features(), packed.in_features(), packed.bytes()), (2, 3, 12));
        let mut bytes = [0; 12];
        device.driver().read(packed.address(), &mut bytes).unwrap();
        assert_eq!(bytes, bytemuck::cast_slice::<_, u8>(&brains));
    }
    let device = Cuda::new(MemoryDriver::new(ROOM), Element::F16).unwrap();
    let matrix = DenseMatrix::new(2, 3, DenseValues::BF16(brains.into())).unwrap();
    let refused = device.pack_dense("lm_head", &matrix).unwrap_err().to_string();
    assert!(refused.contains("lm_head") && refused.contains("BF16"), "{refused}");
}

#[test]
fn a_quantized_matrix_without_a_kernel_is_refused_by_name() {
    let device = Cuda::new(MemoryDriver::new(ROOM), Element::F16).unwrap();
    let parts = |bits, group_size| QuantizedParts {
        out_features: 2,
        in_features: 192,
        bits,
        group_size,
        codes: vec![1; 2 * 192],
        scales: vec![0.5; 2 * 192_usize.div_ceil(group_size)],
        offsets: GroupOffsets::ZeroPoints(vec![8; 2 * 192_usize.div_ceil(group_size)]),
        input_permutation: None,
    };
    for (bits, group_size, argument) in [(8, 64, "bits is 8"), (4, 48, "group_size is 48")] {
        let matrix = QuantizedMatrix::new(parts(bits, group_size)).unwrap();
        let refused = device.pack_quantized("layers.3.down_proj", &matrix).unwrap_err().to_string();
        assert!(refused.contains(argument) && refused.contains("layers.3.down_proj"), "{refused}");
    }
    let offsets = GroupOffsets::Minimums(vec![-4.0; 2 * 3]);
    let matrix = QuantizedMatrix::new(QuantizedParts { offsets, ..parts(4, 64) }).unwrap();
    let refused = device.pack_quantized("layers.3.down_proj", &matrix).unwrap_err().to_string();
    assert!(refused.contains("minimums") && refused.contains("layers.3.down_proj"), "{refused}");
}

#[test]
fn a_copy_of_a_quantized_matrix_has_memory_of_its_own() {
    let driver = MemoryDriver::new(ROOM);
    let device = Cuda::new(driver.clone(), Element::F16).unwrap();
    let (out_features, in_features, group_size) = (64, 128, 64);
    let parts = QuantizedParts {
        out_features,
        in_features,
        bits: 4,
        group_size,
        codes: (0..out_features * in_features).map(|index| (index * 7 % 16) as u8).collect(),
        scales: vec![0.5; out_features * 2],
        offsets: GroupOffsets::ZeroPoints(vec![8; out_features * 2]),
        input_permutation: None,
    };
    let matrix = device.pack_quantized("weight", &QuantizedMatrix::new(parts).unwrap()).unwrap();
    let bytes = |memory: &Memory| {
        let mut bytes = vec![0; memory.bytes()];
        driver.read(memory.address(), &mut bytes).unwrap();
        bytes
    };
    let copy = device.copy_quantized(&matrix).unwrap();
    let (codes, scales) = (bytes(&matrix.codes), bytes(&matrix.scales));
    assert_eq!(matrix.bytes(), copy.bytes());
    drop(matrix);
    assert_eq!((bytes(&copy.codes), bytes(&copy.scales)), (codes, scales));
}
